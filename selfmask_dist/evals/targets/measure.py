"""What a run measures where it is not trained towards one class: a linear probe, and its own head.

    multilabel   probe_map, head_map                   dense   probe_miou, head_miou
    regression   probe_r2, probe_mae, head_r2, head_mae

k-NN is a vote on one class and is left out, which the start of a run says.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from selfmask_dist import data
from selfmask_dist.backbones import Backbone
from selfmask_dist.config import Config
from selfmask_dist.evals.embed import eval_mode
from selfmask_dist.evals.embeddings import Embeddings
from selfmask_dist.evals.measure import Evaluation
from selfmask_dist.evals.progress import Progress
from selfmask_dist.evals.targets.patches import measure_maps, num_images_for, probe_patches
from selfmask_dist.evals.targets.probe import probe_targets, scores_of
from selfmask_dist.objectives import Objective
from selfmask_dist.parallel import World


def open_run_targets(config: Config, train: data.Source, test: data.Source | None) -> data.Targets | None:
    """Return the targets of a run's data, held against both parts; None where they are labels.

    Raises:
        ValueError: a sample has none, or other ones than the training images.
    """
    if config.objective.target == "class":
        return None
    targets = data.open_targets(train, config.objective.target)
    if test is not None:
        targets.check(test, "data.test" if config.data.held_out is None else "data.held_out")
    return targets


def begin_evaluation(
    config: Config,
    backbone: Backbone,
    train: data.Source,
    test: data.Source | None,
    world: World,
    *,
    validation: data.Source | None = None,
    begin_loop: Callable[[], Callable[[], None]] = lambda: lambda: None,
) -> Evaluation:
    """Return what evaluates a run's encoder, by `objective.target`; raises as `open_run_targets`."""
    targets = open_run_targets(config, train, test)
    if targets is None:
        return Evaluation(config, backbone, train, test, world, validation=validation, begin_loop=begin_loop)
    if validation is not None:
        targets.check(validation, "train.validation")
    kind = DenseEvaluation if targets.kind == "dense" else TargetEvaluation
    evaluation = kind(config, backbone, train, test, world, validation=validation, begin_loop=begin_loop)
    evaluation.use(targets, test)
    return evaluation


class TargetEvaluation(Evaluation):
    """Evaluates the encoder of a run on several labels or on numbers; see `Evaluation`."""

    _targets: data.Targets

    def use(self, targets: data.Targets, test: data.Source | None) -> None:
        """Take the targets, and the test part that has them."""
        self.targets = self._targets = targets
        self._test = test

    def full(self, *, probe: bool, progress: Progress | None = None) -> dict[str, float]:
        """Measure the linear probe where it is asked for, with the whole train part; see `Evaluation`."""
        if self._test is None or not probe:
            return {}
        if progress is None:
            return self._probe(None)
        return progress.once("probe", lambda: self._probe(progress))

    def _probe(self, progress: Progress | None) -> dict[str, float]:
        assert self._test is not None
        train, test = self._train, self._test
        if progress is None:
            bank, queries = self._embed(train), self._embed(test)
        else:
            bank = self._embed_kept(progress, "train", train)
            queries = self._embed_kept(progress, "test", test)
        found = probe_targets(
            self._targets.kind,
            (bank, self._of(train, bank)),
            (queries, self._of(test, queries)),
            seed=self._config.seed,
            ranks=self._world,
            on_step=self._begin_loop(),
        )
        return {f"probe_{name}": value for name, value in found.scores.items()}

    def monitor(self, _step: int) -> dict[str, float]:
        """Measure instance retrieval where the run does: k-NN has no meaning here."""
        if not self.measures_retrieval:
            return {}
        hits = self.retrieve()
        return {"monitor/instance_retrieval": sum(hits) / len(hits)}

    def head(self, objective: Objective, progress: Progress | None) -> dict[str, float]:
        """Measure the objective's own head on the test part, with what `begin` gave."""
        if progress is None or self._test is None:
            return {}
        test, kept, width = self._test, progress, len(self._targets.outputs)

        def predict(images: Tensor) -> Tensor:
            with eval_mode(objective):
                return objective.predict(self._backbone.encoder, images).float()

        def measure_head() -> dict[str, float]:
            found = self._embed_kept(kept, "head", test, encode_fn=predict, dim=width)
            targets = self._of(test, found)
            scores = scores_of(self._targets.kind, found.features, targets, found.ids, self._world)
            return {f"head_{name}": value for name, value in scores.items()}

        return kept.once("head", measure_head)

    def _with_targets(self, source: data.Source) -> Iterator[data.Batch]:
        """Yield this rank's batches with their targets; label maps go through the pictures' crop."""
        preprocessing = self._backbone.spec.preprocessing
        is_dense = self._targets.kind == "dense"
        loader = data.eval_loader(
            source,
            data.DenseTransform(preprocessing) if is_dense else data.eval_transform(preprocessing),
            batch_size=self._config.eval.batch_size,
            rank=self._world.rank,
            world_size=self._world.size,
            workers=data.Workers(self._config.engine.workers, self._config.engine.worker_kind),
        ).with_targets(self._targets)
        on_batch = self._begin_loop()
        for batch in loader:
            yield batch
            on_batch()

    def _of(self, source: data.Source, rows: Embeddings) -> Tensor:
        """Return the targets of embedded samples, on their device."""
        return self._targets.of(source, rows.ids.cpu().numpy()).to(rows.features.device)


class DenseEvaluation(TargetEvaluation):
    """Evaluates the encoder of a run on label maps."""

    def _probe(self, progress: Progress | None) -> dict[str, float]:
        del progress  # patches are too many to keep
        assert self._test is not None
        encoder, size = self._backbone.encoder, self._backbone.spec.preprocessing.image_size
        with eval_mode(encoder), torch.no_grad():
            grid = encoder(torch.zeros(1, 3, size, size, device=self._world.device)).shape[1:3]
        train = data.evenly_spaced(self._train, num_images_for(grid.numel()))
        value = probe_patches(
            encoder,
            self._with_targets(train),
            self._with_targets(self._test),
            len(self._targets.outputs),
            self._world,
            self._world.device,
            self._begin_loop(),
        )
        return {"probe_miou": value}

    def head(self, objective: Objective, progress: Progress | None) -> dict[str, float]:
        """Measure the objective's own head on the test part, with what `begin` gave."""
        if progress is None or self._test is None:
            return {}
        test, encoder = self._test, self._backbone.encoder

        def measure_head() -> dict[str, float]:
            with eval_mode(objective), eval_mode(encoder):
                value = measure_maps(
                    lambda images: objective.predict(encoder, images),
                    self._with_targets(test),
                    len(self._targets.outputs),
                    self._world,
                    self._world.device,
                )
            return {"head_miou": value}

        return progress.once("head", measure_head)
