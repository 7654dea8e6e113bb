"""What an engine trains: one tensor, of which this process may hold a part, and the state of all together."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from selfmask_dist.masking import Shards


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

    @torch.no_grad()
    def whole(self, tensor: Tensor) -> Tensor:
        """Return the whole of this parameter, or of a tensor cut like it, on the CPU. Collective."""
        return self.shards.whole(self.name, tensor.detach()).cpu().clone()

    @torch.no_grad()
    def fill(self, tensor: Tensor, whole: Tensor) -> None:
        """Copy this process's part of a whole tensor into `tensor`."""
        piece = self.piece(tensor)
        if piece.shape != whole.shape:
            rows = whole.reshape(-1, *piece.shape[1:])
            whole = rows[self.first_row : self.first_row + len(piece)]
        piece.copy_(whole)


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


# what torch's optimizers call the parts of an EngineState that are theirs
SGD_SLOTS = {"momentum": "momentum_buffer"}
ADAMW_SLOTS = {"momentum": "exp_avg", "second_moment": "exp_avg_sq", "num_updates": "step"}
MOMENTS = tuple(ADAMW_SLOTS)


def check_fits(state: EngineState, shapes: Mapping[str, torch.Size]) -> None:
    """Raise a ValueError where a state is not one of these parameters."""
    missing, unknown = (
        sorted(set(shapes) - set(state.parameters)),
        sorted(set(state.parameters) - set(shapes)),
    )
    if missing or unknown:
        raise ValueError(
            f"the state does not fit what is trained: missing {missing[:5]}, unknown {unknown[:5]}"
        )
    for name, shape in shapes.items():
        if state.parameters[name].shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(state.parameters[name].shape)} in the state and {tuple(shape)} here"
            )
