"""Every number of an encoder: k-NN, linear probe and head accuracy on the test split, instance retrieval on
training images, and the live monitor.

Without labels, or without a test split, only instance retrieval is left. Glue between `embed` (models) and
`evals` (numbers), so that those two need not know each other.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from selfmask_dist import data, evals
from selfmask_dist.backbones import Backbone
from selfmask_dist.config import Config
from selfmask_dist.evals import instance_retrieval
from selfmask_dist.evals.embed import embed, eval_mode
from selfmask_dist.evals.embeddings import Embeddings
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
) -> dict[str, float]:
    """Return the accuracy for each k, by name. Bank and queries stay on their ranks. Collective: every rank
    must call.

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
    )
    return {f"knn{k}": accuracy for (k, _), accuracy in result.accuracy.items()}


def measure_probe(bank: Embeddings, queries: Embeddings, *, seed: int, world: World) -> float:
    """Return the accuracy of a linear probe. Collective: every rank must call."""
    return evals.linear_probe(bank, queries, seed=seed, ranks=world).accuracy


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
        on_batch: called after each batch, on all ranks equally often: the place to stop at.
    """

    def __init__(
        self,
        config: Config,
        backbone: Backbone,
        train: data.Source,
        test: data.Source | None,
        world: World,
        *,
        on_batch: Callable[[], None] = lambda: None,
    ) -> None:
        self._on_batch = on_batch
        self._config = config
        self._backbone = backbone
        self._train = train
        self._test = test if test is not None and are_labelled(train, test) else None
        self._world = world
        self._num_classes = len(train.classes)

    def full(self, *, probe: bool) -> dict[str, float]:
        """Measure k-NN for every `eval.knn_k`, and the linear probe, with the whole train split as bank;
        nothing without labels.
        """
        if self._test is None:
            return {}
        bank, queries = self._embed(self._train), self._embed(self._test)
        values = self._knn(bank, queries, neighbours_to_measure(self._config, len(self._train)))
        if probe:
            values["probe"] = measure_probe(bank, queries, seed=self._config.seed, world=self._world)
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
            found = embed(self._backbone.encoder, _one_view_each(loader, len(bank)), world=self._world)
            is_clean = found.ids < len(bank)
            clean, views = found.where(is_clean), found.where(~is_clean)
            views = Embeddings(views.features, views.labels, views.ids - len(bank))
        else:
            assert isinstance(looked_for, data.Subset)
            clean = self._embed(bank)
            loader = self._loader(looked_for, view, seed=instance_retrieval.VIEW_SEED)
            views = embed(self._backbone.encoder, loader, world=self._world)
            places = torch.from_numpy(looked_for.indices).to(views.ids.device)
            views = Embeddings(views.features, views.labels, places[views.ids])
        return instance_retrieval.find_own(clean, views, self._world)

    def head(self, objective: Objective) -> dict[str, float]:
        """Measure the accuracy of the objective's own head on the test split."""
        if self._test is None:
            return {}
        counts = torch.zeros(2, dtype=torch.float64)
        with torch.no_grad(), eval_mode(self._backbone.encoder), eval_mode(objective):
            for batch in self._loader(self._test):
                rows = batch.weights > 0
                logits = objective.predict(
                    self._backbone.encoder, batch.views[0].to(self._world.device)
                ).cpu()
                counts += torch.tensor([(logits.argmax(1) == batch.labels)[rows].sum(), rows.sum()])
        correct, total = self._world.sum(counts.to(self._world.device)).tolist()
        return {"head": correct / total}

    def _knn(self, bank: Embeddings, queries: Embeddings, ks: tuple[int, ...]) -> dict[str, float]:
        temperature = self._config.eval.knn_temperature
        return measure_knn(bank, queries, ks, temperature, num_classes=self._num_classes, world=self._world)

    def _embed(self, source: data.Source) -> Embeddings:
        encoder: nn.Module = self._backbone.encoder
        return embed(encoder, self._loader(source), world=self._world)

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
        for batch in loader:
            yield batch
            self._on_batch()


def _one_view_each(batches: Iterable[data.Batch], num_samples: int) -> Iterator[data.Batch]:
    """Yield each view of a batch as a batch of its own, the second one's ids from `num_samples` on."""
    for batch in batches:
        for view, images in enumerate(batch.views):
            yield replace(batch, views=(images,), ids=batch.ids + view * num_samples)
