"""One tensor that is trained, and how this process's part of it relates to the whole."""

from dataclasses import dataclass

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
        """This process's part of this parameter, or of something that lies like it, sharing its storage."""
        return self.shards.piece(self.name, tensor.detach())

    @torch.no_grad()
    def whole(self, tensor: Tensor) -> Tensor:
        """The whole of this parameter, or of something shaped like it, on the CPU. Collective."""
        return self.shards.whole(self.name, tensor.detach()).cpu().clone()

    @torch.no_grad()
    def fill(self, tensor: Tensor, whole: Tensor) -> None:
        """Copy this process's part of a whole tensor into `tensor`."""
        piece = self.piece(tensor)
        if piece.shape != whole.shape:
            rows = whole.reshape(-1, *piece.shape[1:])
            whole = rows[self.first_row : self.first_row + len(piece)]
        piece.copy_(whole)
