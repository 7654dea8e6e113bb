"""Objectives: `(encoder, batch) -> (loss, metrics)`, with heads of their own. A new one is a file and a "
"line."""

import difflib
from collections.abc import Callable
from typing import Any

from selfmask_dist.backbones import Backbone
from selfmask_dist.objectives import supervised, swav
from selfmask_dist.objectives.base import Context, Objective
from selfmask_dist.objectives.supervised import Distillation, Supervised
from selfmask_dist.objectives.swav import Swav, SwavOptions
from selfmask_dist.seeding import named_generator

__all__ = [
    "OBJECTIVES",
    "Context",
    "Distillation",
    "Objective",
    "Supervised",
    "Swav",
    "SwavOptions",
    "build_objective",
    "named_generator",
]

OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "supervised": supervised.build,
    "swav": swav.build,
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
