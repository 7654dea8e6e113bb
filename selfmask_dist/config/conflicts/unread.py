"""Which sections and keys a method reads, and which of those that were given it does not.

A file may serve several methods; a key on the command line that nobody reads is most likely a mistake.
"""

from collections.abc import Iterable, Sequence

from selfmask_dist.config.all_sections import AllSections
from selfmask_dist.config.masks import MASK_FAMILIES, RANKING_FAMILIES
from selfmask_dist.config.procedures import PROCEDURES, trained_by

# what every method reads, and what each one reads beyond
ALWAYS = ("backbone", "data", "eval", "engine", "checkpoint", "run", "launch")
_TRAINING = ("objective", "optim", "train", "augment")
_OBJECTIVES = ("crops", "swav", "simclr", "moco_v2", "moco_v3", "dino", "nbd", "clip", "slip")
READS = {
    "mask": ("mask", *_TRAINING, *_OBJECTIVES),
    "finetune": ("finetune", *_TRAINING, *_OBJECTIVES),
    "cascade": ("mask", *_TRAINING, *_OBJECTIVES, "cascade"),
    "probe": (),
    "frozen": (),
}
_OF_FAMILIES = {
    "keep": RANKING_FAMILIES,
    "keep_scope": RANKING_FAMILIES,
    "keep_schedule": (*RANKING_FAMILIES, "soft_movement"),
    "penalty": ("soft_movement",),
    "block_rows": ("block_movement",),
    "block_columns": ("block_movement",),
    "graft_from": ("graft",),
}


def sections_of(config: AllSections) -> tuple[str, ...]:
    """Return the sections that a configuration's method and objective read."""
    stage = trained_by(config.procedure, config.method)
    own = config.objective.name if "objective" in READS[stage] else ""
    read = [name for name in READS[stage] if name not in _OBJECTIVES or name in (own, "crops")]
    if own == "slip":
        read += ["simclr", "clip"]
    return (*ALWAYS, *read, *(["procedure"] if config.method in PROCEDURES else []))


def unread(config: AllSections, overrides: Sequence[str]) -> list[str]:
    """Return a sentence for each `key=value` of the command line that the run will not read."""
    keys = dict.fromkeys(text.partition("=")[0].strip() for text in overrides)
    return list(_complaints(config, keys))


def _complaints(config: AllSections, keys: Iterable[str]) -> Iterable[str]:
    read, family = sections_of(config), config.mask.family
    for key in keys:
        section, dot, name = key.partition(".")
        if key == "objective.target" and config.method in ("probe", "frozen"):
            continue  # it says what is measured
        if dot and section not in read:
            why = f"method={config.method}"
            if section in _OBJECTIVES and "objective" in read:
                why += f" with objective.name={config.objective.name}"
            yield f"{key} is given, and {why} does not read the section {section}"
        elif key == "optim.score_lr" and config.optim.score_reach is not None:
            yield (
                f"{key} is given, and optim.score_reach={config.optim.score_reach} is in its place; set "
                f"that to null for a rate of your own"
            )
        elif section == "mask" and family in MASK_FAMILIES:
            others = _OF_FAMILIES.get(name, (family,))
            if family not in others:
                yield f"{key} is given, and mask.family={family} does not read it ({', '.join(others)} do)"
