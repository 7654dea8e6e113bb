"""Objectives: `(encoder, batch) -> (loss, metrics)`, with heads of their own. A new one is a file and a "
"line."""

import difflib
from collections.abc import Callable
from typing import Any

from selfmask_dist.backbones import Backbone
from selfmask_dist.common.seeding import named_generator
from selfmask_dist.objectives import clip, dino, moco_v2, moco_v3, simclr, slip, supervised, swav
from selfmask_dist.objectives.base import Context, Objective, Teacher
from selfmask_dist.objectives.clip import Clip
from selfmask_dist.objectives.dino import Dino, DinoOptions
from selfmask_dist.objectives.moco_v2 import MocoV2, MocoV2Options
from selfmask_dist.objectives.moco_v3 import MocoV3, MocoV3Options
from selfmask_dist.objectives.simclr import Simclr, SimclrOptions
from selfmask_dist.objectives.slip import Slip, SlipOptions
from selfmask_dist.objectives.supervised import Distillation, Supervised
from selfmask_dist.objectives.swav import Swav, SwavOptions

__all__ = [
    "OBJECTIVES",
    "Clip",
    "Context",
    "Dino",
    "DinoOptions",
    "Distillation",
    "MocoV2",
    "MocoV2Options",
    "MocoV3",
    "MocoV3Options",
    "Objective",
    "Simclr",
    "SimclrOptions",
    "Slip",
    "SlipOptions",
    "Supervised",
    "Swav",
    "SwavOptions",
    "Teacher",
    "build_objective",
    "named_generator",
]

OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "supervised": supervised.build,
    "swav": swav.build,
    "simclr": simclr.build,
    "moco_v2": moco_v2.build,
    "moco_v3": moco_v3.build,
    "dino": dino.build,
    "clip": clip.build,
    "slip": slip.build,
}


def build_objective(
    name: str,
    *,
    backbone: Backbone,
    classes: tuple[str, ...],
    context: Context | None = None,
    **options: Any,
) -> Objective:
    """Build an objective for a backbone and the classes of a data set.

    Args:
        name: a key of `OBJECTIVES`.
        context: this rank's place; None for one process.
        options: keywords of that objective's `build`.

    Raises:
        ValueError: unknown name (naming the nearest), or options that the objective refuses.
    """
    if name not in OBJECTIVES:
        near = difflib.get_close_matches(name, OBJECTIVES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(OBJECTIVES)}"
        raise ValueError(f"there is no objective {name!r}; {hint}")
    return OBJECTIVES[name](backbone, classes, context or Context(), **options)
