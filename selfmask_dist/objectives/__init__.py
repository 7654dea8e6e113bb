"""Objectives: `(encoder, batch) -> (loss, metrics)`, with heads of their own.

A new one is a file here, a section of the configuration, and a line in `OBJECTIVES`.
"""

from collections.abc import Callable
from typing import Any

from selfmask_dist.backbones import Backbone
from selfmask_dist.config import Config
from selfmask_dist.objectives import clip, dino, moco_v2, moco_v3, nbd, simclr, slip, swav, targets
from selfmask_dist.objectives.base import BufferPart, Context, MomentumTeacher, Objective
from selfmask_dist.objectives.clip import Clip
from selfmask_dist.objectives.dino import Dino
from selfmask_dist.objectives.moco_v2 import MocoV2
from selfmask_dist.objectives.moco_v3 import MocoV3
from selfmask_dist.objectives.nbd import Nbd
from selfmask_dist.objectives.simclr import Simclr
from selfmask_dist.objectives.slip import Slip
from selfmask_dist.objectives.supervised import LogitsFn, Supervised
from selfmask_dist.objectives.swav import Swav

__all__ = [
    "OBJECTIVES",
    "BufferPart",
    "Clip",
    "Context",
    "Dino",
    "LogitsFn",
    "MocoV2",
    "MocoV3",
    "MomentumTeacher",
    "Nbd",
    "Objective",
    "Simclr",
    "Slip",
    "Supervised",
    "Swav",
    "build_objective",
]

OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "supervised": targets.build,
    "swav": swav.build,
    "simclr": simclr.build,
    "moco_v2": moco_v2.build,
    "moco_v3": moco_v3.build,
    "dino": dino.build,
    "nbd": nbd.build,
    "clip": clip.build,
    "slip": slip.build,
}


def build_objective(
    config: Config,
    *,
    backbone: Backbone,
    classes: tuple[str, ...],
    context: Context | None = None,
    distill_teacher: LogitsFn | None = None,
) -> Objective:
    """Return the objective `config.objective.name` for a backbone and the classes of a data set.

    Args:
        context: this rank's place and the run's length; None for one process and one step.
        distill_teacher: for the supervised objective alone, see `Supervised`.

    Raises:
        ValueError: a backbone, a number of classes or of ranks that the objective refuses.
    """
    extra: dict[str, Any] = {} if distill_teacher is None else {"distill_teacher": distill_teacher}
    build = OBJECTIVES[config.objective.name]
    return build(config, backbone, classes, context or Context(), **extra)
