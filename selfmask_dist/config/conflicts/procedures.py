"""Conflicts of the procedures, whose stages are trainings of masks or of weights."""

from collections.abc import Iterator

from selfmask_dist.config.all_sections import AllSections
from selfmask_dist.config.backbone import BackboneConfig
from selfmask_dist.config.loading import Conflict
from selfmask_dist.config.procedures import PROCEDURES, trained_by


def procedure_conflicts(config: AllSections) -> Iterator[Conflict]:
    """Yield what a procedure does not go together with in the rest of a configuration."""
    section, method, engine = config.procedure, config.method, config.engine.name
    if (section.hold is not None or method in ("packnet", "lottery")) and engine != "ddp":
        yield Conflict(
            ("method", "engine.name"),
            f"engine.name={engine} cuts weights over processes, and single weights cannot be kept there; set "
            "engine.name=ddp",
        )
    if section.hold is not None and method != "finetune":
        yield Conflict(
            ("method", "procedure.hold"), "procedure.hold is of method=finetune, which trains weights"
        )
    if method not in PROCEDURES:
        return
    if config.objective.name != "supervised":
        yield Conflict(
            ("method", "objective.name"),
            f"method={method} compares classifiers by accuracy; set objective.name=supervised",
        )
    yield from _head_conflicts(config)
    yield from _stage_conflicts(config)
    max_steps = config.train.max_steps
    if method == "lottery" and max_steps is not None and section.rewind_steps >= max_steps:
        yield Conflict(
            ("procedure.rewind_steps", "train.max_steps"),
            f"procedure.rewind_steps ({section.rewind_steps}) leaves nothing to train before train.max_steps "
            f"({max_steps})",
        )


def _head_conflicts(config: AllSections) -> Iterator[Conflict]:
    """Yield heads that a procedure cannot take apart, superpose or permute."""
    method, head = config.method, config.objective.head
    known = {
        "wise_ft": ("linear", "clip_text"),
        **dict.fromkeys(("supsup", "rebasin", "ensemble"), ("linear",)),
    }
    if head not in known.get(method, (head,)):
        yield Conflict(
            ("method", "objective.head"),
            f"method={method} does not handle objective.head={head}; set it to {' or '.join(known[method])}",
        )
    if method == "rebasin" and config.objective.head_norm == "batchnorm":
        yield Conflict(
            ("method", "objective.head_norm"),
            "method=rebasin permutes what the head sees, and not statistics of a head's normalisation; set "
            "objective.head_norm to l2 or none",
        )


def _stage_conflicts(config: AllSections) -> Iterator[Conflict]:
    """Yield trainings that a procedure cannot go on from."""
    section, method, engine = config.procedure, config.method, config.engine.name
    finetune, family = config.finetune.train, config.mask.family
    masks = trained_by(section, method) == "mask"
    if masks and family not in ("threshold", "piggyback", "edge_popup", "topk"):
        yield Conflict(
            ("method", "mask.family"),
            f"method={method} takes learned masks on frozen weights, and mask.family={family} is another "
            "thing; use threshold, piggyback, edge_popup or topk",
        )
    trains = method == "rebasin" or (method == "ensemble" and section.small_backbone)
    if trains and finetune != "all":
        yield Conflict(
            ("method", "finetune.train"),
            f"method={method} trains whole networks; set finetune.train=all in place of {finetune}",
        )
    if method == "wise_ft" and section.adapt == "finetune" and finetune == "lora":
        yield Conflict(
            ("method", "finetune.train"),
            "method=wise_ft mixes the network's own weights, and finetune.train=lora leaves them as they "
            "are; set finetune.train=all, bias or norm",
        )
    if engine in ("bits", "deepspeed") and (trains or not masks):
        yield Conflict(
            ("method", "engine.name"),
            f"method={method} trains weights, which was not tried with engine.name={engine}; use ddp or fsdp",
        )
    if unknown := sorted(set(section.small_backbone) - set(BackboneConfig.model_fields)):
        yield Conflict(
            ("procedure.small_backbone",),
            f"procedure.small_backbone has the key {unknown[0]}, which the backbone section does not know",
        )
