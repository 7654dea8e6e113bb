"""Every number of an encoder: k-NN, linear probe and head accuracy on the test split, instance retrieval on
training images, and the live monitor.

Without labels, or without a test split, only instance retrieval is left. Glue between `embed` (models) and
`evals` (numbers), so that those two need not know each other.
"""

import functools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from selfmask_dist import data, evals
from selfmask_dist.backbones import Backbone
from selfmask_dist.config import Config
from selfmask_dist.evals import instance_retrieval
from selfmask_dist.evals.embed import embed, eval_mode, in_precision
from selfmask_dist.evals.embeddings import Embeddings
from selfmask_dist.evals.progress import Progress
from selfmask_dist.evals.ranks import share
from selfmask_dist.objectives import Objective
from selfmask_dist.parallel import World


def measure_knn(
    bank: Embeddings,
    queries: Embeddings,
    ks: tuple[int, ...],
    temperature: float,
    *,
    num_classes: int,
    world: World,
    memory_mib: float | None = None,
) -> dict[str, float]:
    """Return the accuracy for each k, by name. Bank and queries stay on their ranks. Collective: every rank
    must call.

    Args:
        memory_mib: of the search (`eval.search_mib`).

    Raises:
        ValueError: the bank has fewer than k samples.
    """
    size = int(world.sum(torch.tensor([len(bank.ids)], device=world.device)))
    if max(ks) > size:
        raise ValueError(
            f"k-NN with k={max(ks)} and a bank of {size} images: there are not so many neighbours. Set "
            f"eval.knn_k to smaller numbers"
        )
    result = evals.global_knn(
        bank,
        queries,
        num_classes=num_classes,
        ks=sorted(set(ks)),
        temperatures=(temperature,),
        ranks=world,
        memory_mib=memory_mib,
    )
    return {f"knn{k}": accuracy for (k, _), accuracy in result.accuracy.items()}


def measure_probe(
    bank: Embeddings,
    queries: Embeddings,
    *,
    seed: int,
    world: World,
    on_step: Callable[[], None] = lambda: None,
) -> float:
    """Return the accuracy of a linear probe. Collective: every rank must call.

    Args:
        on_step: called in each step of its fits, on all ranks equally often.
    """
    return evals.linear_probe(bank, queries, seed=seed, ranks=world, on_step=on_step).accuracy


def neighbours_to_measure(config: Config, num_train: int) -> tuple[int, ...]:
    """Return the k of `eval.knn_k` to measure with a bank of `num_train` images.

    Nobody has asked for the default: of it, what is larger than the bank is left out, which the start of a
    run says. A k that was asked for stays, and is refused where there are not so many neighbours.
    """
    ks = tuple(config.eval.knn_k)
    if ks != tuple(type(config.eval).model_fields["knn_k"].default):
        return ks
    return tuple(k for k in ks if k <= num_train) or ks


def are_labelled(train: data.Source, test: data.Source | None) -> bool:
    """Return whether there are labels to measure k-NN and probe with, on every image of both splits."""
    return test is not None and all(data.count_labels(source)[0] == 0 for source in (train, test))


class Evaluation:
    """Evaluates the encoder as it stands. Every method is a collective: every rank must call.

    Args:
        test: None where there is no test split.
        validation: images to choose by while training, which are neither trained on nor tested on.
        begin_loop: called before each loop over batches; what it returns is called after each batch, on all
            ranks equally often: the place to stop at.
    """

    targets: data.Targets | None = None  # of a run that is not trained towards one class

    def __init__(
        self,
        config: Config,
        backbone: Backbone,
        train: data.Source,
        test: data.Source | None,
        world: World,
        *,
        validation: data.Source | None = None,
        begin_loop: Callable[[], Callable[[], None]] = lambda: lambda: None,
    ) -> None:
        self._validation = validation
        self._begin_loop = begin_loop
        self._config = config
        self._precision = config.eval.precision
        self._backbone = backbone
        self._train = train
        self._test = test if test is not None and are_labelled(train, test) else None
        self._world = world
        self._num_classes = len(train.classes)

    def begin(self, path: Path, *, made_with: str, report: Callable[[str], None]) -> Progress | None:
        """Return what was done before of measuring one encoder, kept in the folder `path`.

        None where there is nothing to measure by labels.

        Args:
            made_with: tells what was trained apart from anything else; empty of the frozen encoder.
            report: gets one sentence where something that was there is made again.
        """
        if self._test is None:
            return None
        spec, engine = self._backbone.spec, self._config.engine
        engine_is_bf16 = engine.name == "fsdp" and engine.precision == "bf16"  # whose forward then is
        return Progress(
            path,
            self._world,
            about={
                "backbone": spec.fingerprint,
                "preprocessing": json.dumps(spec.preprocessing.to_dict(), sort_keys=True),
                "training data": json.dumps(self._train.identity, sort_keys=True),
                "test data": json.dumps(self._test.identity, sort_keys=True),
                "mask or weights": made_with,
                "precision": "bf16" if self._precision == "bf16" or engine_is_bf16 else "float32",
            },
            batch_size=self._config.eval.batch_size,
            report=report,
        )

    def full(self, *, probe: bool, progress: Progress | None = None) -> dict[str, float]:
        """Measure k-NN for every `eval.knn_k`, and the linear probe, with the whole train split as bank;
        nothing without labels.

        Args:
            progress: what was done before is taken from there, and what is done goes there.
        """
        if self._test is None:
            return {}
        train, test = self._train, self._test

        @functools.cache
        def rows() -> tuple[Embeddings, Embeddings]:
            if progress is None:
                return self._embed(train), self._embed(test)
            return self._embed_kept(progress, "train", train), self._embed_kept(progress, "test", test)

        def knn() -> dict[str, float]:
            return self._knn(*rows(), neighbours_to_measure(self._config, len(train)))

        def linear() -> dict[str, float]:
            bank, queries = rows()  # a loop of its own, before that of the probe begins
            on_step, seed = self._begin_loop(), self._config.seed
            return {"probe": measure_probe(bank, queries, seed=seed, world=self._world, on_step=on_step)}

        measures = {"knn": knn, **({"probe": linear} if probe else {})}
        values: dict[str, float] = {}
        for name, measure_fn in measures.items():
            values |= measure_fn() if progress is None else progress.once(name, measure_fn)
        return values

    def monitor(self, _step: int) -> dict[str, Any]:
        """Measure k-NN on the test split with at most `eval.monitor_samples` of bank and queries, and
        instance retrieval where the run measures it.
        """
        values: dict[str, Any] = {}
        if self.measures_retrieval:
            hits = self.retrieve()
            values[f"monitor/{instance_retrieval.MEASURE}"] = sum(hits) / len(hits)
        if self._test is None:
            return values
        limit = self._config.eval.monitor_samples
        bank = self._embed(data.evenly_spaced(self._train, limit))
        queries = self._embed(data.evenly_spaced(self._test, limit))
        accuracies = self._knn(bank, queries, self._config.eval.knn_k[:1])
        return {f"monitor/{name}": value for name, value in accuracies.items()} | values

    @property
    def measures_retrieval(self) -> bool:
        """Whether the run measures instance retrieval (`eval.retrieval`)."""
        return self._config.eval.measures_retrieval(self._config.objective.name)

    def retrieve(self) -> list[bool]:
        """Return for each of `eval.retrieval_samples` training images whether a mild view of it finds it.

        The images are at equal distances through the training source; images and views are the same every
        time, on any number of ranks.
        """
        section, pre = self._config.eval, self._backbone.spec.preprocessing
        bank = data.evenly_spaced(self._train, section.retrieval_bank or section.retrieval_samples)
        looked_for = data.evenly_spaced(bank, section.retrieval_samples)
        view = instance_retrieval.mild_view(pre, flip=self._config.data.flip)
        if looked_for is bank:  # each picture is read once for both views
            both = data.Joined(data.eval_transform(pre), view)
            loader = self._loader(bank, both, seed=instance_retrieval.VIEW_SEED)
            found = self._embed_loaded(_one_view_each(loader, len(bank)))
            is_clean = found.ids < len(bank)
            clean, views = found.where(is_clean), found.where(~is_clean)
            views = Embeddings(views.features, views.labels, views.ids - len(bank))
        else:
            assert isinstance(looked_for, data.Subset)
            clean = self._embed(bank)
            loader = self._loader(looked_for, view, seed=instance_retrieval.VIEW_SEED)
            views = self._embed_loaded(loader)
            places = torch.from_numpy(looked_for.indices).to(views.ids.device)
            views = Embeddings(views.features, views.labels, places[views.ids])
        return instance_retrieval.find_own(clean, views, self._world)

    def head(self, objective: Objective, progress: Progress | None) -> dict[str, float]:
        """Measure the accuracy of the objective's own head on the test split, with what `begin` gave."""
        if progress is None or self._test is None:
            return {}
        test, kept = self._test, progress

        def predict(images: Tensor) -> Tensor:
            with eval_mode(objective):
                logits = objective.predict(self._backbone.encoder, images)
            return logits.argmax(dim=1, keepdim=True).float()  # below 2^24, so exact

        def measure_head() -> dict[str, float]:
            found = self._embed_kept(kept, "head", test, encode_fn=predict, dim=1)
            return {"head": share(found.features[:, 0].long() == found.labels, self._world)}

        return kept.once("head", measure_head)

    @torch.no_grad()
    def validate(self, objective: Objective) -> dict[str, float]:
        """Return the objective's loss and metrics on the validation images, as they are evaluated, by name;
        nothing where there are none.
        """
        if self._validation is None:
            return {}
        encoder, device = self._backbone.encoder, self._world.device
        totals: dict[str, Tensor] = {}
        with eval_mode(encoder), eval_mode(objective):
            for batch in self._with_targets(self._validation):
                # sums over rows, so that counts of right answers are whole numbers on any number of ranks
                batch = replace(batch.to(device), global_count=1)
                with torch.autocast(device.type, torch.bfloat16, enabled=self._precision == "bf16"):
                    _, metrics = objective(encoder, batch)
                for name, value in metrics.items():
                    totals[name] = totals.get(name, 0.0) + value.double()
        sums = self._world.sum(torch.stack([total for _, total in sorted(totals.items())]))
        count = len(self._validation)
        return {
            f"validation/{name}": total / count
            for name, total in zip(sorted(totals), sums.tolist(), strict=True)
        }

    def _with_targets(self, source: data.Source) -> Iterator[data.Batch]:
        """Yield this rank's batches with what an objective is trained towards."""
        return self._loader(source)

    def _knn(self, bank: Embeddings, queries: Embeddings, ks: tuple[int, ...]) -> dict[str, float]:
        temperature = self._config.eval.knn_temperature
        return measure_knn(
            bank,
            queries,
            ks,
            temperature,
            num_classes=self._num_classes,
            world=self._world,
            memory_mib=self._config.eval.search_mib,
        )

    def _embed(self, source: data.Source) -> Embeddings:
        return self._embed_loaded(self._loader(source))

    def _embed_loaded(self, loader: Iterable[data.Batch]) -> Embeddings:
        encoder: nn.Module = self._backbone.encoder
        return embed(encoder, loader, world=self._world, precision=self._precision)

    def _embed_kept(
        self,
        progress: Progress,
        split: str,
        source: data.Source,
        *,
        encode_fn: Callable[[Tensor], Tensor] | None = None,
        dim: int | None = None,
    ) -> Embeddings:
        """Return this rank's embeddings, or what else `encode_fn` makes of images, kept in `progress`."""
        with eval_mode(self._backbone.encoder):
            return progress.embed(
                split,
                in_precision(encode_fn or self._backbone.encoder, self._precision, self._world.device),
                source,
                data.eval_transform(self._backbone.spec.preprocessing),
                dim=dim or self._backbone.spec.dim,
                workers=data.Workers(self._config.engine.workers, self._config.engine.worker_kind),
                on_batch=self._begin_loop(),
            )

    def _loader(
        self, source: data.Source, transform: data.Transform | None = None, *, seed: int = 0
    ) -> Iterator[data.Batch]:
        loader = data.eval_loader(
            source,
            transform or data.eval_transform(self._backbone.spec.preprocessing),
            batch_size=self._config.eval.batch_size,
            rank=self._world.rank,
            world_size=self._world.size,
            workers=data.Workers(self._config.engine.workers, self._config.engine.worker_kind),
            seed=seed,
        )
        on_batch = self._begin_loop()
        for batch in loader:
            yield batch
            on_batch()


def _one_view_each(batches: Iterable[data.Batch], num_samples: int) -> Iterator[data.Batch]:
    """Yield each view of a batch as a batch of its own, the second one's ids from `num_samples` on."""
    for batch in batches:
        for view, images in enumerate(batch.views):
            yield replace(batch, views=(images,), ids=batch.ids + view * num_samples)
