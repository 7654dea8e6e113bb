"""Conflicts of `objective.target`: what is trained towards, and what does not go with it."""

from collections.abc import Iterator

from selfmask_dist.config.all_sections import AllSections
from selfmask_dist.config.loading import Conflict

_METHODS = ("mask", "finetune", "probe", "frozen")


def target_conflicts(config: AllSections) -> Iterator[Conflict]:
    """Yield methods, objectives and settings that are of one class an image alone."""
    objective, target = config.objective, config.objective.target
    if objective.class_weights != "none" and (target not in ("class", "multilabel") or _is_other(config)):
        yield Conflict(
            ("objective.class_weights", "objective.target"),
            f"objective.class_weights={objective.class_weights} is of objective.name=supervised with "
            f"objective.target=class or multilabel; set it to none",
        )
    if target == "class":
        return
    way = "set objective.target=class"
    if config.method not in _METHODS:
        yield Conflict(
            ("method", "objective.target"),
            f"objective.target={target} is of method={', '.join(_METHODS)}; method={config.method} is of one "
            f"class an image; {way}",
        )
    if _is_other(config):
        yield Conflict(
            ("objective.name", "objective.target"),
            f"objective.target={target} is of objective.name=supervised, and {objective.name} learns without "
            f"targets; {way}",
        )
    if objective.distill_from is not None:
        yield Conflict(
            ("objective.distill_from", "objective.target"),
            f"objective.distill_from teaches one class an image; {way}, or objective.distill_from=null",
        )
    if objective.label_smoothing and target != "dense":
        yield Conflict(
            ("objective.label_smoothing", "objective.target"),
            f"objective.label_smoothing spreads one class's probability over the others, and "
            f"objective.target={target} has no such; set it to 0",
        )
    if objective.head == "clip_text" or (target == "dense" and objective.head != "linear"):
        yield Conflict(
            ("objective.head", "objective.target"),
            f"objective.head={objective.head} is not for objective.target={target}; set it to linear",
        )
    if target == "dense":
        yield from _dense_conflicts(config)


def _is_other(config: AllSections) -> bool:
    return config.method in ("mask", "finetune") and config.objective.name != "supervised"


def _dense_conflicts(config: AllSections) -> Iterator[Conflict]:
    if config.backbone.pool != "model":
        yield Conflict(
            ("backbone.pool", "objective.target"),
            f"backbone.pool={config.backbone.pool} makes one vector of an image, and objective.target=dense "
            "needs one a patch; set backbone.pool=model",
        )
    if config.objective.head_norm == "batchnorm":
        yield Conflict(
            ("objective.head_norm", "objective.target"),
            "objective.head_norm=batchnorm counts images, and objective.target=dense has patches; set "
            "it to l2",
        )
    if config.eval.measures_retrieval(config.objective.name):
        yield Conflict(
            ("eval.retrieval", "objective.target"),
            "eval.retrieval compares vectors of whole images, and objective.target=dense has patches; set "
            "eval.retrieval=false",
        )
