"""How the tensors in this process relate to the whole parameters: all of each, or a piece of its rows.

A parameter under a mask is rewritten piece by piece, elementwise; only a few numbers for each scaled tensor,
such as sum M and <G, theta>, need the other ranks. `Shards` is that knowledge and nothing else, so masks stay
free of process groups: an engine that shards passes in a subclass. This one says that every process holds
everything.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from selfmask_dist.masking.families.base import Family
    from selfmask_dist.masking.parameter import MaskedParameter


class Shards:
    """Every process holds whole parameters. Subclasses override what differs.

    The rows of a piece are consecutive rows of the whole tensor (its dimension 0), or, where a subclass cuts
    finer, consecutive elements of the flattened one.
    """

    is_whole = True
    copies = 1  # processes that hold the same piece
    place = 0  # of this process's pieces among those of one tensor
    num_places = 1

    def new_scores(self, name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Uninitialised scores for the part of parameter `name` that this process trains."""
        return torch.empty_like(weight, dtype=dtype)

    def piece(self, name: str, tensor: Tensor) -> Tensor:
        """This process's piece of a tensor that belongs to parameter `name`, sharing its storage."""
        return tensor

    def first_row(self, name: str, theta: Tensor) -> int:
        """Where that piece begins in the whole tensor, in rows."""
        return 0

    def gradient(self, name: str, theta: Tensor) -> Tensor | None:
        """This process's piece of theta's gradient, summed over ranks; None where there is none."""
        return theta.grad

    def sum(self, values: Tensor) -> Tensor:
        """Sum a small vector over the processes that hold pieces. Collective: every rank must call."""
        return values

    def sum_written(self, sums: Tensor, entries: Sequence["MaskedParameter"], family: "Family") -> Tensor:
        """Sums of `Family.write`, a row for each segment, over ranks. Collective: every rank must call."""
        return self.sum(sums)

    def complete(self, entries: Sequence["MaskedParameter"], *, is_scaled: bool) -> None:
        """Called when every entry's piece of theta and its scales are new."""

    def whole(self, name: str, tensor: Tensor) -> Tensor:
        """The whole tensor of what is trained (scores, their momentum) from this process's. Collective."""
        return tensor

    def whole_weight(self, name: str, weight: Tensor) -> Tensor:
        """The whole of a tensor that lies as theta and the frozen weight do. Collective."""
        return weight
