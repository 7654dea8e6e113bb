"""The buffers of an objective whole, as a checkpoint has them, on any number of ranks."""

from collections.abc import Mapping

from torch import Tensor

from selfmask_dist.objectives import Objective
from selfmask_dist.parallel import World
from selfmask_dist.parallel.moving_average import MovingAverage
from selfmask_dist.parallel.parts import KeptParts, gather, whole_parts
from selfmask_dist.training.state import buffer_parts, load_buffers


def whole_buffers(objective: Objective, world: World | None = None) -> dict[str, Tensor]:
    """Collective: every rank must call."""
    world = world or World()
    found = gather(buffer_parts(objective, world), world)
    return {name.removeprefix("buffers/"): tensor for name, tensor in found.items()}


def averages_of(teacher: MovingAverage) -> dict[str, Tensor]:
    """Of one process: the averages and statistics by name; they are views."""
    return {part.name.removeprefix("teacher/"): part.tensor for part in teacher.parts(World())}


def load_whole_buffers(objective: Objective, buffers: Mapping[str, Tensor]) -> None:
    """Collective: every rank must call."""
    named = {f"buffers/{name}": tensor for name, tensor in buffers.items()}
    load_buffers(objective, KeptParts(whole_parts(named)))
