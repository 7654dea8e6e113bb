"""One parameter under a mask: theta, the frozen weight and the scores, whole or as this process's piece.

Where one parameter has several scales (q, k and v of a fused projection), its rows fall into equal segments;
a piece may hold all of a segment, a part of it or nothing. Knows nothing of models or process groups.
"""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from selfmask_dist.masking.shards import Shards


@dataclass(frozen=True)
class Segment:
    """The part of one parameter's piece that one scale belongs to: views of tensors of this process."""

    theta: Tensor
    weight: Tensor
    scores: Tensor


class MaskedParameter:
    """One parameter under a mask: theta (the module's own), the frozen weight W and the trained scores S."""

    def __init__(
        self, name: str, theta: nn.Parameter, init: float | Tensor, num_segments: int, shards: Shards
    ) -> None:
        self.name = name
        self.theta = theta
        self.shards = shards
        self.weight = theta.detach().clone()
        # float32: bf16 would round small updates of a score near 1 away
        dtype = torch.float64 if theta.dtype == torch.float64 else torch.float32
        self.scores = nn.Parameter(shards.new_scores(name, self.weight, dtype))
        self.num_segments = num_segments
        self.num_kept: list[Tensor] = []  # per segment of the whole tensor, 0-d float64
        self.scales: list[Tensor] = []  # per segment of the whole tensor, 0-d, theta's dtype
        piece = self.piece(self.scores)
        self._first_row = shards.first_row(name, theta)
        row = math.prod(piece.shape[1:])
        self._num_rows = theta.numel() // row if row else 0  # of the whole tensor
        self.fill(init)

    def piece(self, tensor: Tensor) -> Tensor:
        """This process's piece of theta, the weight, the scores, or a gradient of one of them."""
        return self.shards.piece(self.name, tensor)

    def bounds(self) -> list[tuple[int, int]]:
        """For each segment, which rows of this process's piece belong to it: (first, last + 1)."""
        length = -(-self._num_rows // self.num_segments)
        rows = len(self.piece(self.scores))

        def within(row: int) -> int:
            return min(max(row - self._first_row, 0), rows)

        return [(within(i * length), within((i + 1) * length)) for i in range(self.num_segments)]

    def split(self, piece: Tensor) -> list[Tensor]:
        """Views of a piece, one for each segment; empty where this process holds nothing of a segment."""
        if self.num_segments == 1:
            return [piece]
        return [piece[start:stop] for start, stop in self.bounds()]

    def segment_sizes(self) -> list[int]:
        """N of each segment of the whole tensor."""
        length = -(-self._num_rows // self.num_segments)
        row = self.theta.numel() // max(self._num_rows, 1)
        starts = [min(i * length, self._num_rows) for i in range(self.num_segments + 1)]
        return [(stop - start) * row for start, stop in itertools.pairwise(starts)]

    def segments(self) -> list[Segment]:
        pieces = [self.split(self.piece(t)) for t in (self.theta.detach(), self.weight, self.scores.detach())]
        return [Segment(*views) for views in zip(*pieces, strict=True)]

    @torch.no_grad()
    def fill(self, values: float | Tensor) -> None:
        """Set the scores: to one number, or to this process's piece of a whole tensor (parameter's shape)."""
        piece = self.piece(self.scores)
        if not isinstance(values, Tensor):
            piece.fill_(values)
            return
        if values.shape != piece.shape:  # rows of a piece: of the whole tensor, or of the flattened one
            values = values.reshape(-1, *piece.shape[1:])
            values = values[self._first_row : self._first_row + len(piece)]
        piece.copy_(values)
