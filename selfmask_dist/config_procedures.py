"""Keys of the procedures that are chains of trainings: PackNet, lottery tickets, Knowledge Evolution.

Each stage is a `method=finetune` run of its own, with its own folder. Knows nothing of torch.
"""

from collections.abc import Iterator
from typing import Literal

from selfmask_dist.config_loading import Conflict
from selfmask_dist.config_sections import NonEmpty, Section, SomeStrings, science

PROCEDURES = ("packnet", "lottery", "evolution")


class ProcedureConfig(Section):
    """Chains of trainings (method=packnet, lottery, evolution); every training is one of `train.epochs`."""

    include: NonEmpty | SomeStrings = science(
        "auto",
        "packnet, lottery, and evolution's split by weights: parameters that are shared out, pruned or "
        "split; presets and patterns as in mask.include. Only those of two or more dimensions are taken.",
    )
    tasks: int = science(
        2,
        "packnet: the classes of data.train, in their order, make so many tasks of nearly equal size, which "
        "are learned one after the other.",
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


def conflicts(
    section: ProcedureConfig, *, method: str, engine: str, objective: str, max_steps: int | None
) -> Iterator[Conflict]:
    """What does not go together with the rest of a configuration."""
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
    if method in PROCEDURES and objective != "supervised":
        yield Conflict(
            ("method", "objective.name"),
            f"method={method} compares classifiers by accuracy; set objective.name=supervised",
        )
    if method == "lottery" and max_steps is not None and section.rewind_steps >= max_steps:
        yield Conflict(
            ("procedure.rewind_steps", "train.max_steps"),
            f"procedure.rewind_steps ({section.rewind_steps}) leaves nothing to train before train.max_steps "
            f"({max_steps})",
        )
