"""What this process holds of a parameter under a mask: pieces, and what it knows of the whole.

A parameter has one scale or, as a fused q, k and v, several; the part under one scale is a segment. Theta is
rewritten segment by segment and elementwise, so that a process needs only its own piece of each, and a few
numbers of the whole segment, such as sum M and <G, theta>. `Shards` is what is known of the other pieces; an
engine that shards passes in a subclass, and masks stay free of process groups.

Imports nothing of the package, as all other files of it build on this one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

_NONE = torch.zeros(0)


@dataclass(frozen=True)
class Cut:
    """Which elements of one piece are among the k largest of the whole.

    value: the k-th largest, 0-d.
    dropped: of this piece's elements equal to it, so many of the last are not kept.
    """

    value: Tensor
    dropped: int

    def write(self, ranked: Tensor, *, out: Tensor) -> Tensor:
        """Write ones (True) where `ranked` is kept and zeros elsewhere into `out`; both have one shape."""
        torch.ge(ranked, self.value, out=out)
        if self.dropped:
            ties = (ranked == self.value).nonzero()[-self.dropped :]
            out[tuple(ties.T)] = 0
        return out


@dataclass
class Whole:
    """One segment as all ranks see it, from one writing of theta to the next.

    numel, shape: of the whole segment.
    measured: what `Family.measure` gave, summed over pieces, 1-D.
    cut: of families that rank: which of this process's piece are kept.
    sums: what `Family.write` gave, summed over pieces, 1-D float64; the first is the number of kept weights.
    kept: sums[0], 0-d.
    scale: a = (numel / kept)^(1/2), 0-d, of theta's dtype (float32 where that is a half).
    step: of the forward that theta is for, from 0.
    num_tensors: segments of the model in all.
    """

    numel: int
    shape: torch.Size
    measured: Tensor | None = None
    cut: Cut | None = None
    sums: Tensor = field(default=_NONE)
    kept: Tensor = field(default=_NONE)
    scale: Tensor = field(default=_NONE)
    step: int = 0
    num_tensors: int = 1


@dataclass(frozen=True)
class Segment:
    """This process's piece of one segment: views of its tensors, all of one shape.

    Where a tensor is cut, a piece holds consecutive rows of it, or (engine bits) consecutive elements, flat.

    numbers: small trained tensor of families that have one, 1-D, the same on all ranks.
    start: index of the piece's first element in the whole segment, flattened.
    other: second frozen weights, of families that have them.
    """

    theta: Tensor
    weight: Tensor
    scores: Tensor
    whole: Whole
    start: int = 0
    numbers: Tensor | None = None
    other: Tensor | None = None


class SegmentedParameter(Protocol):
    """What `Shards` needs to know of a parameter under a mask; see `parameter.MaskedParameter`."""

    name: str
    num_segments: int

    @property
    def theta(self) -> Tensor: ...
    @property
    def weight(self) -> Tensor: ...
    @property
    def scales(self) -> list[Tensor]: ...
    def segments(self) -> list[Segment]: ...
    def split(self, piece: Tensor) -> list[Tensor]: ...


class Shards:
    """How this process's tensors relate to whole parameters. Here: it holds all of each.

    Subclasses override what differs. The rows of a piece are consecutive rows of the whole tensor (its
    dimension 0), or, where a subclass cuts finer, consecutive elements of the flattened one.
    """

    is_whole = True
    copies = 1  # processes that hold the same piece
    piece_index = 0  # of this process's pieces among those of one tensor
    num_pieces = 1

    def new_scores(self, name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Return uninitialised scores for the part of parameter `name` that this process trains."""
        return torch.empty_like(weight, dtype=dtype)

    def piece(self, name: str, tensor: Tensor) -> Tensor:
        """Return this process's piece of a tensor that belongs to parameter `name`, sharing its storage."""
        return tensor

    def first_row(self, name: str, theta: Tensor) -> int:
        """Return where that piece begins in the whole tensor, in rows."""
        return 0

    def gradient(self, name: str, theta: Tensor) -> Tensor | None:
        """Return this process's piece of theta's gradient, summed over ranks; None where there is none."""
        return theta.grad

    def sum(self, values: Tensor) -> Tensor:
        """Sum a small vector over the processes that hold pieces. Collective: every rank must call."""
        return values

    def sum_written(
        self,
        sums: Tensor,
        entries: Sequence[SegmentedParameter],
        *,
        threshold: float | None,
        mask_fn: Callable[[Segment], Tensor],
    ) -> Tensor:
        """Sum what `Family.write` gave, a row for each segment, over ranks. Collective: every rank must call.

        Args:
            threshold: what is kept has scores above it; None of families whose masks follow otherwise.
            mask_fn: `Family.mask`, for subclasses that send the mask itself along.
        """
        return self.sum(sums)

    def complete(self, entries: Sequence[SegmentedParameter], *, is_scaled: bool) -> None:
        """Complete theta. Called when every entry's piece of it and its scales are new."""

    def whole(self, name: str, tensor: Tensor) -> Tensor:
        """Return the whole tensor of what is trained: scores, their momentum. Collective."""
        return tensor

    def whole_weight(self, name: str, weight: Tensor) -> Tensor:
        """Return the whole of a tensor that lies as theta and the frozen weight do. Collective."""
        return weight
