"""The keys of masks: which parameters carry one, of which family, and what goes together.

`config_sections` has the rules. Knows nothing of torch, and so of families only their names;
`masking.families` has the same.
"""

import difflib
from collections.abc import Iterator
from typing import Literal

from selfmask_dist.config.loading import Conflict
from selfmask_dist.config.sections import NonEmpty, Section, SomeStrings, Strings, science

# weights under these are trained or quantised: no masks on frozen weights
LATENT_FAMILIES = ("twn", "ttq", "binary_connect", "neural_wirings")
BESIDE_FAMILIES = ("movement", "soft_movement", "joint", "block_movement")  # scores and weights are trained
OTHER_FAMILIES = (*LATENT_FAMILIES, *BESIDE_FAMILIES, "multi_prize", "graft")
MASK_FAMILIES = ("threshold", "piggyback", "edge_popup", "topk", "random", "magnitude", *OTHER_FAMILIES)
FIXED_FAMILIES = ("random", "magnitude")  # nothing of them is trained
RANKING_FAMILIES = (  # what mask.keep speaks to
    "edge_popup",
    "topk",
    *FIXED_FAMILIES,
    "multi_prize",
    "neural_wirings",
    "movement",
    "block_movement",
)
THRESHOLD_FAMILIES = ("threshold", "piggyback", "joint", "graft")


class MaskConfig(Section):
    """Which parameters carry a mask M, by which rule, and the scale a of theta = a * W * M."""

    family: NonEmpty = science(
        "threshold",
        "How masks follow from scores: " + ", ".join(MASK_FAMILIES) + "; or module:Class, a family of your "
        "own. docs/methods.md has an entry for each.",
    )
    include: NonEmpty | SomeStrings = science(
        "auto",
        "Parameters to mask: presets (auto, vit, resnet, clip_visual) and glob patterns over parameter "
        "names. auto is vit where that matches anything, else resnet.",
    )
    exclude: Strings = science((), "Glob patterns over parameter names that are taken out again.")
    first_layers: int | None = science(
        None,
        "Mask only the first so many of the layers that include and exclude leave; null: all.",
        unit="layers",
        ge=1,
    )
    maskable: float = science(
        1.0,
        "Share of each tensor's weights that may be pruned; the others are always kept (Paper, appendix F).",
        unit="fraction of the weights",
        gt=0,
        le=1,
    )
    maskable_by: Literal["random", "magnitude"] = science(
        "random", "Which these are: chosen at random, or the largest in magnitude."
    )
    threshold: float = science(
        0.0,
        "mu: a weight is kept where its score is greater. Paper: 0; Piggyback: 0.005. soft_movement: tau, "
        "which sigmoid(score) must exceed at the end of mask.keep_schedule, as 0.1.",
        unit="score",
    )
    keep: float = science(
        0.5,
        "Share of the weights (block_movement: of the blocks) that families which rank keep, exactly: "
        + ", ".join(RANKING_FAMILIES)
        + ".",
        unit="fraction of the weights",
        gt=0,
        le=1,
    )
    keep_scope: Literal["tensor", "global"] = science(
        "tensor", "mask.keep is of each tensor, or of all tensors ranked together."
    )
    keep_schedule: Literal["constant", "linear", "cubic"] = science(
        "constant",
        "constant: mask.keep from the start. linear, cubic: the share goes from 1 to mask.keep in straight "
        "line, or fast at first (keep + (1 - keep) (1 - t)^3).",
    )
    keep_until: float = science(
        0.5,
        "When a linear or cubic mask.keep_schedule arrives.",
        unit="fraction of train.epochs",
        gt=0,
        le=1,
    )
    keep_from: float = science(
        0.0,
        "Until when all is kept, before a linear or cubic mask.keep_schedule begins.",
        unit="fraction of train.epochs",
        ge=0,
        lt=1,
    )
    penalty: float = science(
        0.0,
        "soft_movement: lambda, the weight of mean sigmoid(score) in the loss; it rises with the schedule.",
        unit="loss",
        ge=0,
    )
    block_rows: int = science(
        32, "block_movement: rows of weights that share a score; 0: all of a tensor's.", unit="rows", ge=0
    )
    block_columns: int = science(
        32, "block_movement: columns of a block; 0: all, so that blocks are rows.", unit="columns", ge=0
    )
    graft_from: NonEmpty | None = science(
        None,
        "graft: the fine-tuned weights, as the folder of a finished run of method=finetune or a file that "
        "backbone.weights would take. That family needs it.",
    )
    init: float | Literal["normal", "magnitude", "shuffled_magnitude", "kaiming_uniform"] = science(
        1.0,
        "First scores: a number for all (Paper: 1; only its distance to the threshold, relative to "
        "optim.score_lr, matters; Piggyback: 0.01), or one number each: normal (half of it, mean 1 above "
        "the threshold), magnitude (|W| / mean |W| above it), shuffled_magnitude, kaiming_uniform "
        "(edge-popup's).",
        unit="score",
    )
    scale: Literal["through", "detached", "none"] = science(
        "through",
        "a = (N / sum M)^(1/2) for each tensor. through: gradients flow through it (the authors' code; where "
        "the number kept is fixed there is none). detached: it scales, and gradients do not see it. none: "
        "a = 1 (Piggyback).",
    )
    split_qkv: bool = science(
        False,
        "A scale each for q, k and v of a fused projection, as where they are three tensors (Paper's CLIP).",
    )
    init_from: NonEmpty | None = science(
        None,
        "Folder of a finished run whose newest checkpoint gives the first scores, heads and running "
        "statistics in place of mask.init; the optimizer starts afresh.",
    )
    allow_norm: bool = science(
        False, "Let patterns mask normalisation layers, which destroys the features; false: refuse."
    )


def conflicts(mask: MaskConfig, *, method: str, engine: str, objective: str, head: str) -> Iterator[Conflict]:
    """Values of the mask section that do not go together, or not with those of other sections.

    Args:
        method, engine, objective, head: `method`, `engine.name`, `objective.name`, `objective.head`.
    """
    if mask.family not in MASK_FAMILIES and ":" not in mask.family:
        near = difflib.get_close_matches(mask.family, MASK_FAMILIES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        yield Conflict(
            ("mask.family",),
            f"mask.family {mask.family!r} is neither one of {', '.join(MASK_FAMILIES)} nor "
            f"module:Class{hint}",
        )
    if method not in ("mask", "cascade"):
        return
    yield from _first_score_conflicts(mask)
    yield from _keep_conflicts(mask)
    if mask.family in OTHER_FAMILIES:
        yield from _other_conflicts(mask, method, engine, head if objective == "supervised" else "")
    if mask.family in FIXED_FAMILIES:
        yield from _fixed_conflicts(mask, method, engine, head if objective == "supervised" else "")
    if engine == "deepspeed" and mask.keep_scope == "global":
        yield Conflict(
            ("mask.keep_scope", "engine.name"),
            "engine.name=deepspeed makes tensors one by one and cannot rank all together; set "
            "mask.keep_scope=tensor, or engine.name to ddp, fsdp or bits",
        )


def _first_score_conflicts(mask: MaskConfig) -> Iterator[Conflict]:
    init = mask.init
    if mask.family in THRESHOLD_FAMILIES and not isinstance(init, str) and init <= mask.threshold:
        yield Conflict(
            ("mask.init", "mask.threshold"),
            f"mask.init ({init:g}) must be greater than mask.threshold ({mask.threshold:g}), or every "
            "weight starts pruned",
        )
    if (
        mask.family in ("edge_popup", "topk", "multi_prize")
        and not isinstance(init, str)
        and mask.init_from is None
    ):
        yield Conflict(
            ("mask.family", "mask.init"),
            f"mask.init={init:g} gives all scores one rank, and mask.family={mask.family} would keep the "
            "first weights of each tensor; set mask.init to kaiming_uniform, normal, magnitude or "
            "shuffled_magnitude",
        )
    if mask.family == "piggyback" and mask.scale != "none":
        yield Conflict(
            ("mask.family", "mask.scale"),
            f"mask.family=piggyback has no scale; set mask.scale=none in place of {mask.scale}",
        )


def _keep_conflicts(mask: MaskConfig) -> Iterator[Conflict]:
    if mask.keep_schedule != "constant" and mask.keep_from >= mask.keep_until:
        yield Conflict(
            ("mask.keep_from", "mask.keep_until"),
            f"mask.keep_from ({mask.keep_from:g}) must be less than mask.keep_until ({mask.keep_until:g}), "
            "or the schedule has no time",
        )
    if mask.maskable < 1 and mask.family == "magnitude":
        yield Conflict(
            ("mask.family", "mask.maskable"),
            "mask.family=magnitude ranks all weights; set mask.maskable=1",
        )
    elif mask.family in RANKING_FAMILIES and mask.keep < 1 - mask.maskable:
        yield Conflict(
            ("mask.keep", "mask.maskable"),
            f"mask.keep ({mask.keep:g}) is less than the share that is always kept, 1 - mask.maskable "
            f"({1 - mask.maskable:g}); raise one of them",
        )


def _fixed_conflicts(mask: MaskConfig, method: str, engine: str, head: str) -> Iterator[Conflict]:
    family = mask.family
    if engine == "bits":
        yield Conflict(
            ("mask.family", "engine.name"),
            f"engine.name=bits sends the bits of a trained mask, and mask.family={family} trains none; use "
            "ddp, fsdp or deepspeed",
        )
    if head in ("masked", "clip_text"):
        yield Conflict(
            ("mask.family", "objective.head"),
            f"mask.family={family} trains no mask and objective.head={head} no weights; set "
            "objective.head=linear",
        )
    if method == "cascade":
        yield Conflict(
            ("method", "mask.family"),
            f"a cascade's experts train the dispatcher's mask further, and mask.family={family} trains none; "
            "use another family",
        )
    if mask.keep_schedule != "constant":
        yield Conflict(
            ("mask.family", "mask.keep_schedule"),
            f"mask.family={family} is fixed; set mask.keep_schedule=constant",
        )


def _other_conflicts(mask: MaskConfig, method: str, engine: str, head: str) -> Iterator[Conflict]:
    """Of families that are more than masks on frozen weights."""
    family = mask.family
    if engine in ("bits", "deepspeed"):
        yield Conflict(
            ("mask.family", "engine.name"),
            f"engine.name={engine} trains masks on frozen weights, and mask.family={family} is more; use ddp "
            "or fsdp",
        )
    if head == "masked":
        yield Conflict(
            ("mask.family", "objective.head"),
            f"mask.family={family} is no mask on frozen weights, as a head's is; set objective.head=linear",
        )
    if method == "cascade":
        yield Conflict(
            ("method", "mask.family"),
            f"a cascade keeps its experts as bits on frozen weights, and mask.family={family} is more; use "
            "another family",
        )
    if mask.maskable < 1:
        yield Conflict(
            ("mask.family", "mask.maskable"),
            f"mask.maskable speaks of masks on frozen weights; set it to 1 with mask.family={family}",
        )
    if family == "soft_movement" and not 0 < mask.threshold < 1:
        yield Conflict(
            ("mask.family", "mask.threshold"),
            f"mask.family=soft_movement compares a sigmoid with mask.threshold ({mask.threshold:g}); set it "
            "between 0 and 1, as 0.1",
        )
    if family == "movement" and mask.keep_schedule == "constant" and not isinstance(mask.init, str):
        yield Conflict(
            ("mask.family", "mask.keep_schedule"),
            "mask.family=movement would keep the first weights of each tensor, as all scores start alike; "
            "set mask.keep_schedule=cubic (the published one), or mask.init=normal",
        )
    if family == "block_movement" and mask.keep_scope == "global":
        yield Conflict(
            ("mask.family", "mask.keep_scope"),
            "mask.family=block_movement ranks the blocks of one tensor; set mask.keep_scope=tensor",
        )
    if family == "block_movement" and mask.keep_schedule == "constant":
        yield Conflict(
            ("mask.family", "mask.keep_schedule"),
            "mask.family=block_movement would keep the first blocks of each tensor, as all scores start "
            "alike; set mask.keep_schedule=cubic",
        )
