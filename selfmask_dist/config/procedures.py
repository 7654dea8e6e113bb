"""Keys of the procedures over masks and weights, whose stages are runs of their own in the run's folder.

Knows nothing of torch.
"""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, JsonValue

from selfmask_dist.config.backbone import BackboneConfig
from selfmask_dist.config.loading import Conflict
from selfmask_dist.config.sections import Counts, NonEmpty, Section, SomeStrings, science

PROCEDURES = ("packnet", "lottery", "evolution", "supsup", "wise_ft", "rebasin", "ensemble")

_Alpha = Annotated[float, Field(ge=0, le=1)]


class ProcedureConfig(Section):
    """Chains of runs (method=packnet, lottery, ...); every training is one of `train.epochs`."""

    include: NonEmpty | SomeStrings = science(
        "auto",
        "packnet, lottery, and evolution's split by weights: parameters that are shared out, pruned or "
        "split; presets and patterns as in mask.include. Only those of two or more dimensions are taken.",
    )
    tasks: int = science(
        2,
        "packnet, supsup: the classes of data.train, in their order, make so many tasks of nearly equal "
        "size, which are learned one after the other.",
        unit="tasks",
        ge=1,
        le=255,
    )
    keep: float = science(
        0.5,
        "packnet: share of each tensor's free weights that a task keeps for good; the others are pruned and "
        "left to later tasks. Mallya & Lazebnik: 0.25 to 0.5.",
        unit="fraction of the free weights",
        gt=0,
        le=1,
    )
    retrain: float = science(
        0.5,
        "packnet: length of the training after pruning. Mallya & Lazebnik: half of the first one.",
        unit="fraction of train.epochs",
        gt=0,
    )
    rounds: int = science(
        3, "lottery: times that weights are pruned, each followed by a training.", unit="rounds", ge=1
    )
    prune: float = science(
        0.2,
        "lottery: share of the remaining weights that a round prunes. Frankle & Carbin: 0.2.",
        unit="fraction of the remaining weights",
        gt=0,
        lt=1,
    )
    scope: Literal["global", "tensor"] = science(
        "global", "lottery: the smallest of all weights together are pruned, or of each tensor."
    )
    rewind_steps: int = science(
        0,
        "lottery: k. Each round goes on from the state after so many steps, optimizer and order of images "
        "included; 0: from the start.",
        unit="steps",
        ge=0,
    )
    generations: int = science(
        3, "evolution: trainings, each from its parent's fit half.", unit="trainings", ge=1
    )
    split: Literal["kels", "wels"] = science(
        "kels",
        "evolution: kels: the first kernels of each layer (convolutional networks), which make a slim "
        "network. wels: a random choice of weights (any network).",
    )
    split_rate: float = science(
        0.5,
        "evolution: share of channels (kels) or weights (wels) that is kept.",
        unit="fraction",
        gt=0,
        le=1,
    )
    infer: Literal["each", "one-shot", "binary"] = science(
        "each",
        "supsup: which of the three that are measured gives the result's accuracy. each: the lowest entropy "
        "under a mask alone, a forward for each task; the surest on pretrained weights. one-shot: one "
        "gradient of the masks' superposition, for many tasks. binary: the better half of the tasks stays, "
        "again and again.",
    )
    infer_images: Counts = science(
        (16,),
        "supsup: test images, all of one task, whose task is inferred together; more are told apart better. "
        "Several numbers are all measured, and the first one is the result's.",
        unit="images",
    )
    adapt: Literal["finetune", "mask"] = science(
        "finetune", "wise_ft: what the frozen weights are adapted by: finetune, or a mask."
    )
    held_out: float = science(
        0.2,
        "wise_ft: share of each class's training images that are not trained on, and choose alpha.",
        unit="fraction of the images",
        gt=0,
        lt=1,
    )
    alphas: Annotated[tuple[_Alpha, ...], Field(strict=False, min_length=1)] = science(
        (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
        "wise_ft, rebasin: places on the line between two networks that are measured; 0: the frozen (first) "
        "one, 1: the adapted (second) one.",
        unit="share of the second network",
    )
    match_images: int = science(
        1024,
        "rebasin: training images at most, at equal distances through the set, on which activations are "
        "matched, losses measured and statistics of batch normalisation renewed.",
        unit="images",
        ge=1,
    )
    members: int = science(
        3, "ensemble: masks, each from a seed of its own; and as many small models.", unit="members", ge=1
    )
    small_backbone: dict[str, JsonValue] = science(
        {},
        "ensemble: keys of the backbone section, as {name: timm:resnet10t}, of small models that are trained "
        "from random weights for comparison; empty: none are. Make them as large as a mask's file.",
    )
    hold: NonEmpty | None = science(
        None,
        "File (.safetensors) that says of each weight whether method=finetune trains it (1), keeps it (0) or "
        "keeps it at zero (2), int8 by parameter; null: all are trained. The stages write them.",
    )
    start_from: NonEmpty | None = science(
        None,
        "Folder of a run from whose newest checkpoint this one goes on as if it were its own; null: from the "
        "start. The stages set it.",
    )


def trained_by(section: ProcedureConfig, method: str) -> str:
    """The method of a procedure's stages, mask or finetune; of no procedure the method itself."""
    if method in ("supsup", "ensemble") or (method == "wise_ft" and section.adapt == "mask"):
        return "mask"
    return "finetune" if method in PROCEDURES else method


def conflicts(
    section: ProcedureConfig,
    *,
    method: str,
    engine: str,
    objective: str,
    head: str,
    head_norm: str,
    finetune: str,
    family: str,
    max_steps: int | None,
) -> Iterator[Conflict]:
    """What does not go together with the rest of a configuration.

    Args:
        method, engine, objective, head, head_norm, finetune, family, max_steps: `method`, `engine.name`,
            `objective.name`, `objective.head`, `objective.head_norm`, `finetune.train`, `mask.family`,
            `train.max_steps`.
    """
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
    if objective != "supervised":
        yield Conflict(
            ("method", "objective.name"),
            f"method={method} compares classifiers by accuracy; set objective.name=supervised",
        )
    yield from _head_conflicts(method, head, head_norm)
    yield from _stage_conflicts(section, method, engine, finetune, family)
    if method == "lottery" and max_steps is not None and section.rewind_steps >= max_steps:
        yield Conflict(
            ("procedure.rewind_steps", "train.max_steps"),
            f"procedure.rewind_steps ({section.rewind_steps}) leaves nothing to train before train.max_steps "
            f"({max_steps})",
        )


def _head_conflicts(method: str, head: str, head_norm: str) -> Iterator[Conflict]:
    """Heads that a procedure cannot take apart, superpose or permute."""
    known = {
        "wise_ft": ("linear", "clip_text"),
        **dict.fromkeys(("supsup", "rebasin", "ensemble"), ("linear",)),
    }
    if head not in known.get(method, (head,)):
        yield Conflict(
            ("method", "objective.head"),
            f"method={method} does not handle objective.head={head}; set it to {' or '.join(known[method])}",
        )
    if method == "rebasin" and head_norm == "batchnorm":
        yield Conflict(
            ("method", "objective.head_norm"),
            "method=rebasin permutes what the head sees, and not statistics of a head's normalisation; set "
            "objective.head_norm to l2 or none",
        )


def _stage_conflicts(
    section: ProcedureConfig, method: str, engine: str, finetune: str, family: str
) -> Iterator[Conflict]:
    """Trainings that a procedure cannot go on from."""
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
