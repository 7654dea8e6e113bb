"""What an engine trains: one tensor, of which this process may hold a part, and the state of all together."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TypeVar

import torch
from torch import Tensor, nn

from selfmask_dist.masking import Shards
from selfmask_dist.parallel.parts import TensorPart
from selfmask_dist.parallel.world import World

_T = TypeVar("_T")


@dataclass(frozen=True)
class TrainedParameter:
    """One tensor that the optimizer holds, and how it relates to the whole one."""

    tensor: nn.Parameter
    name: str  # within the model that `shards` was made for
    shape: torch.Size  # of the whole tensor
    shards: Shards
    first_row: int = 0

    def piece(self, tensor: Tensor) -> Tensor:
        """Return this process's part of this parameter, or of a tensor cut like it; the storage is shared."""
        return self.shards.piece(self.name, tensor.detach())

    def part(self, name: str, tensor: Tensor, world: World) -> TensorPart:
        """Return this process's part of this parameter, or of a tensor cut like it, under `name`."""
        if not tensor.ndim and self.shape:  # a count: one number for the whole tensor
            return TensorPart(name, tensor.shape, tensor.detach(), copies=world.size, copy=world.rank)
        piece = self.piece(tensor)
        row = self.shape[1:].numel() if piece.ndim == len(self.shape) else 1  # else cut by elements
        return TensorPart(
            name,
            self.shape,
            piece,
            self.first_row * row,
            copies=world.size if self.shards.is_whole else self.shards.copies,
            copy=world.rank // self.shards.num_pieces,  # neighbouring ranks hold one copy together
        )


@dataclass(frozen=True)
class EngineState:
    """All that is trained, whole and on the CPU, by parameter name; nothing frozen is in it."""

    parameters: dict[str, Tensor]  # scores of masked parameters, heads (or weights) as they are
    momentum: dict[str, Tensor]  # SGD's, or AdamW's first moment
    statistics: dict[str, Tensor] = field(default_factory=dict)  # running ones of normalisation layers
    step: int = 0  # steps that masks have made, for schedules
    second_moment: dict[str, Tensor] = field(default_factory=dict)  # AdamW's
    num_updates: dict[str, Tensor] = field(default_factory=dict)  # AdamW's, 0-d each
    teacher: dict[str, Tensor] = field(default_factory=dict)  # moving averages, where an objective has one


# tensors by name; a part of a state is called part/name
PARTS = tuple(part.name for part in fields(EngineState) if part.name != "step")
# what torch's optimizers call the parts of an EngineState that are theirs
SGD_SLOTS = {"momentum": "momentum_buffer"}
ADAMW_SLOTS = {"momentum": "exp_avg", "second_moment": "exp_avg_sq", "num_updates": "step"}
MOMENTS = tuple(ADAMW_SLOTS)


def by_part(named: Mapping[str, _T]) -> dict[str, dict[str, _T]]:
    """Return what is called part/name as name -> value for each part of an `EngineState`, no others."""
    found: dict[str, dict[str, _T]] = {part: {} for part in PARTS}
    for key, value in named.items():
        part, _, name = key.partition("/")
        if part in found:
            found[part][name] = value
    return found


def check_fits(found: Mapping[str, torch.Size], shapes: Mapping[str, torch.Size]) -> None:
    """Raise a ValueError where a state is not one of these parameters.

    Args:
        found: the shapes of the state's parameters, by name. shapes: of what is trained here.
    """
    missing, unknown = sorted(set(shapes) - set(found)), sorted(set(found) - set(shapes))
    if missing or unknown:
        raise ValueError(
            f"the state does not fit what is trained: missing {missing[:5]}, unknown {unknown[:5]}"
        )
    for name, shape in shapes.items():
        if found[name] != shape:
            raise ValueError(f"{name} has shape {tuple(found[name])} in the state and {tuple(shape)} here")
