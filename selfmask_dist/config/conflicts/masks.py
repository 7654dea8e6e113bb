"""Conflicts of the mask section: with itself, and with the method, the engine and the head."""

import difflib
from collections.abc import Iterator

from selfmask_dist.config.all_sections import AllSections
from selfmask_dist.config.loading import Conflict
from selfmask_dist.config.masks import (
    FIXED_FAMILIES,
    MASK_FAMILIES,
    OTHER_FAMILIES,
    RANKING_FAMILIES,
    THRESHOLD_FAMILIES,
    MaskConfig,
)
from selfmask_dist.config.procedures import trained_by


def mask_conflicts(config: AllSections) -> Iterator[Conflict]:
    """Yield values of the mask section that do not go together, or not with those of other sections."""
    mask = config.mask
    if mask.family not in MASK_FAMILIES and ":" not in mask.family:
        near = difflib.get_close_matches(mask.family, MASK_FAMILIES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        yield Conflict(
            ("mask.family",),
            f"mask.family {mask.family!r} is neither one of {', '.join(MASK_FAMILIES)} nor "
            f"module:Class{hint}",
        )
    if trained_by(config.procedure, config.method) not in ("mask", "cascade"):
        return
    yield from _first_score_conflicts(mask)
    yield from _keep_conflicts(mask)
    if mask.family in OTHER_FAMILIES:
        yield from _other_conflicts(config)
    if mask.family in FIXED_FAMILIES:
        yield from _fixed_conflicts(config)
    if config.engine.name == "deepspeed" and mask.keep_scope == "global":
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


def _fixed_conflicts(config: AllSections) -> Iterator[Conflict]:
    """Yield what families that train no mask do not go together with."""
    mask, family, head = config.mask, config.mask.family, _head(config)
    if config.engine.name == "bits":
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
    if config.method == "cascade":
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


def _other_conflicts(config: AllSections) -> Iterator[Conflict]:
    """Yield what families that are more than masks on frozen weights do not go together with."""
    mask, family, engine = config.mask, config.mask.family, config.engine.name
    if engine in ("bits", "deepspeed"):
        yield Conflict(
            ("mask.family", "engine.name"),
            f"engine.name={engine} trains masks on frozen weights, and mask.family={family} is more; use ddp "
            "or fsdp",
        )
    if _head(config) == "masked":
        yield Conflict(
            ("mask.family", "objective.head"),
            f"mask.family={family} is no mask on frozen weights, as a head's is; set objective.head=linear",
        )
    if config.method == "cascade":
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
            "between 0 and 1, for example 0.1",
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


def _head(config: AllSections) -> str:
    """Return the kind of the supervised head; "" where the objective has none."""
    return config.objective.head if config.objective.name == "supervised" else ""


def score_step_conflicts(config: AllSections) -> Iterator[Conflict]:
    """Yield what does not go with score steps of one size: other sizes, clipping, and a plain step's rate."""
    optim = config.optim
    if optim.score_reach is not None and optim.score_step == "plain":
        yield Conflict(
            ("optim.score_reach", "optim.score_step"),
            "optim.score_reach reckons with gradients of one size, and optim.score_step=plain leaves them as "
            "they are; set optim.score_step=rms, or optim.score_reach=null and optim.score_lr",
        )
    if optim.score_reach is not None and optim.score_lr_choices is not None:
        yield Conflict(
            ("optim.score_reach", "optim.score_lr_choices"),
            "optim.score_reach sets the rate that optim.score_lr_choices is to choose; set one to null",
        )
    if optim.score_step == "plain" or config.method not in ("mask", "cascade", "supsup", "ensemble"):
        return
    if optim.kind == "adamw":
        yield Conflict(
            ("optim.score_step", "optim.kind"),
            "optim.score_step=rms gives each tensor's step one size, and AdamW gives each element's one of "
            "its own; use optim.kind=sgd, or optim.score_step=plain",
        )
    if config.engine.name == "deepspeed" and optim.clip_norm is not None:
        yield Conflict(
            ("optim.score_step", "optim.clip_norm", "engine.name"),
            "engine.name=deepspeed clips all gradients together, and with optim.score_step=rms only those "
            "besides the scores' are to be clipped; set optim.clip_norm=null, or use engine.name=fsdp",
        )
    distance = config.mask.way_to_threshold
    if optim.score_reach is None and optim.score_lr >= distance:
        yield Conflict(
            ("optim.score_step", "optim.score_lr"),
            f"optim.score_lr={optim.score_lr:g} is a rate of plain steps: with optim.score_step=rms a step "
            f"moves scores by about so much, and they start {distance:g} from the threshold; set it to .001 "
            "to .01 times that",
        )
