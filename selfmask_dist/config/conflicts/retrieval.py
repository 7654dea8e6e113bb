"""Conflicts of what instance retrieval decides: the state that is kept, and the learning rate."""

from collections.abc import Iterator

from selfmask_dist.config.all_sections import AllSections
from selfmask_dist.config.loading import Conflict
from selfmask_dist.config.masks import FIXED_FAMILIES, LATENT_FAMILIES
from selfmask_dist.config.procedures import trained_by


def retrieval_conflicts(config: AllSections) -> Iterator[Conflict]:
    """Yield choices by instance retrieval where it is not measured, or where there is nothing to choose."""
    bank, samples = config.eval.retrieval_bank, config.eval.retrieval_samples
    if bank is not None and bank < samples:
        yield Conflict(
            ("eval.retrieval_bank", "eval.retrieval_samples"),
            f"eval.retrieval_bank ({bank}) has to hold the images that are looked for in it; set it to "
            f"eval.retrieval_samples ({samples}) or more, or lower that",
        )
    if config.train.keep == "best":
        yield from _keep_conflicts(config)
    if config.optim.score_lr_choices is not None:
        yield from _rate_conflicts(config, config.optim.score_lr_choices)


def _keep_conflicts(config: AllSections) -> Iterator[Conflict]:
    is_training = trained_by(config.procedure, config.method) in ("mask", "finetune", "cascade")
    if is_training and config.method not in ("mask", "finetune"):
        yield Conflict(
            ("train.keep", "method"),
            f"train.keep=best is of method=mask and method=finetune, and method={config.method} trains "
            "several times; set train.keep=last",
        )
    if config.method not in ("mask", "finetune"):
        return
    by = config.train.keep_by or ("instance_retrieval" if config.train.validation is None else "accuracy")
    if by == "instance_retrieval" and not config.eval.measures_retrieval(config.objective.name):
        yield Conflict(
            ("train.keep", "eval.retrieval"),
            "train.keep=best takes the state of the highest instance retrieval, and it is not measured; set "
            "train.validation=0.1 to go by accuracy on held-out images, eval.retrieval=true, or "
            "train.keep=last",
        )
    if not config.eval.knn_every:
        yield Conflict(
            ("train.keep", "eval.knn_every"),
            "train.keep=best chooses among the states that are measured while training, and eval.knn_every=0 "
            "measures none; set it to a number of epochs, or train.keep=last",
        )


def _rate_conflicts(config: AllSections, rates: tuple[float, ...]) -> Iterator[Conflict]:
    key = "optim.score_lr_choices"
    if list(rates) != sorted(set(rates)):
        yield Conflict((key,), f"{key} has to be different rates, the smallest first: {sorted(set(rates))}")
    trained = trained_by(config.procedure, config.method)
    if config.method != "mask" and trained in ("mask", "cascade"):
        yield Conflict(
            (key, "method"),
            f"{key} is of method=mask, and method={config.method} trains several masks; choose the rate with "
            f"a run of method=mask, and set optim.score_lr to it and {key}=null",
        )
    if config.method != "mask":
        return
    if config.objective.name == "supervised" or config.eval.retrieval is False:
        yield Conflict(
            (key, "objective.name", "eval.retrieval"),
            f"{key} are held against each other by instance retrieval, which is for objectives without "
            "labels; with labels compare runs by their accuracy, on images that are kept aside for it",
        )
    if config.mask.family in (*FIXED_FAMILIES, *LATENT_FAMILIES):
        yield Conflict(
            (key, "mask.family"), f"mask.family={config.mask.family} trains no scores; set {key}=null"
        )
