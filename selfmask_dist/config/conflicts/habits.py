"""Conflicts of how a supervised run trains: what is kept and when it ends, averages, mixed images, rates."""

from collections.abc import Iterator

from selfmask_dist.config.all_sections import AllSections
from selfmask_dist.config.loading import Conflict
from selfmask_dist.config.masks import RANKING_FAMILIES
from selfmask_dist.config.objectives import ON_BANK, VIEWS, WITH_CAPTIONS
from selfmask_dist.config.procedures import trained_by


def habit_conflicts(config: AllSections) -> Iterator[Conflict]:
    """Yield what training habits do not go together with in the rest of a configuration."""
    if config.method in ("mask", "finetune"):
        yield from _validation_conflicts(config)
        yield from _average_conflicts(config)
    elif trained_by(config.procedure, config.method) in ("mask", "finetune", "cascade"):
        yield from _several_trainings(config)
    else:
        return
    yield from _image_conflicts(config)
    if config.optim.layer_decay is not None and config.mask.keep_scope == "global" and _ranks(config):
        yield Conflict(
            ("optim.layer_decay", "mask.keep_scope"),
            "optim.layer_decay lets scores of lower layers move less, and mask.keep_scope=global holds "
            "scores of all layers against each other; set mask.keep_scope=tensor, or optim.layer_decay=null",
        )


def _ranks(config: AllSections) -> bool:
    return config.method == "mask" and config.mask.family in RANKING_FAMILIES


def _validation_conflicts(config: AllSections) -> Iterator[Conflict]:
    train, is_supervised = config.train, config.objective.name == "supervised"
    if train.validation is not None and not is_supervised:
        yield Conflict(
            ("train.validation", "objective.name"),
            f"train.validation measures a head by labels, and objective.name={config.objective.name} trains "
            "none; set train.validation=null (train.keep=best then goes by instance retrieval)",
        )
    if train.validation is not None and not config.eval.knn_every:
        yield Conflict(
            ("train.validation", "eval.knn_every"),
            "train.validation is measured while training, and eval.knn_every=0 measures nothing; set it to a "
            "number of epochs, or train.validation=null",
        )
    if train.keep_by in ("accuracy", "loss") and train.validation is None:
        yield Conflict(
            ("train.keep_by", "train.validation"),
            f"train.keep_by={train.keep_by} is measured on images that are not trained on, never on "
            "data.test; set train.validation=0.1, or train.keep_by=null",
        )
    if train.keep_by == "accuracy" and config.objective.target != "class":
        yield Conflict(
            ("train.keep_by", "objective.target"),
            f"train.keep_by=accuracy counts right classes, and objective.target="
            f"{config.objective.target} has none of an image; set train.keep_by=loss",
        )
    for key, value in (("train.keep_by", train.keep_by), ("train.patience", train.patience)):
        if value is not None and train.keep == "last":
            yield Conflict(
                (key, "train.keep"),
                f"{key}={value} is of train.keep=best, and train.keep=last leaves what training ends with; "
                f"set train.keep=best, or {key}=null",
            )


def _average_conflicts(config: AllSections) -> Iterator[Conflict]:
    if config.train.ema is None:
        return
    if config.objective.name != "supervised":
        yield Conflict(
            ("train.ema", "objective.name"),
            f"train.ema is of objective.name=supervised, and {config.objective.name} has its own ways to "
            "average or none; set train.ema=null",
        )
    if config.procedure.hold is not None:
        yield Conflict(
            ("train.ema", "procedure.hold"),
            "train.ema averages what a step has moved, before procedure.hold puts held weights back; set "
            "train.ema=null",
        )
    if config.engine.name == "deepspeed":
        yield Conflict(
            ("train.ema", "engine.name"),
            "train.ema is a moving average that engine.name=deepspeed does not keep; use engine.name=fsdp",
        )


def _several_trainings(config: AllSections) -> Iterator[Conflict]:
    train = config.train
    for key, value in (("train.validation", train.validation), ("train.patience", train.patience)):
        if value is not None:
            yield Conflict(
                (key, "method"),
                f"{key} is of method=mask and method=finetune, and method={config.method} trains several "
                f"times; set {key}=null",
            )
    if train.ema is not None:
        yield Conflict(
            ("train.ema", "method"),
            f"train.ema is of method=mask and method=finetune, and method={config.method} goes on from what "
            "was trained itself; set train.ema=null",
        )


def _image_conflicts(config: AllSections) -> Iterator[Conflict]:
    augment, name = config.augment, config.objective.name
    if augment.mixes and name != "supervised":
        key = "augment.mixup" if augment.mixup else "augment.cutmix"
        yield Conflict(
            (key, "objective.name"),
            f"{key} mixes targets of images, and objective.name={name} has none; set it to 0",
        )
    if augment.mixes and config.objective.target != "class":
        key = "augment.mixup" if augment.mixup else "augment.cutmix"
        yield Conflict(
            (key, "objective.target"),
            f"{key} mixes classes, and objective.target={config.objective.target} is trained towards "
            "something else; set it to 0",
        )
    if augment.changes_pictures and config.objective.target == "dense":
        key = "augment.randaugment" if augment.randaugment else "augment.erase"
        yield Conflict(
            (key, "objective.target"),
            f"{key} would move or cover pixels whose classes objective.target=dense has; set it to 0",
        )
    if augment.changes_pictures:
        key = "augment.randaugment" if augment.randaugment else "augment.erase"
        if name in (*ON_BANK, *VIEWS) and name not in WITH_CAPTIONS:
            yield Conflict(
                (key, "objective.name"),
                f"{key} changes the one view of objective.name=supervised and clip, and {name} makes its own "
                "views (sections crops and nbd); set it to 0",
            )
        if not config.data.augment:
            yield Conflict(
                (key, "data.augment"),
                f"{key} changes images at random, and data.augment=false asks for images as they are "
                "evaluated; set one of them otherwise",
            )
