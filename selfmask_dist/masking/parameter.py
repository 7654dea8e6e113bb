"""One parameter under a mask: theta, the weight and the scores, whole or as this process's piece.

Where one parameter has several scales (q, k and v of a fused projection), its rows fall into equal segments;
a piece may hold all of a segment, a part of it or nothing. Knows nothing of models or process groups.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from selfmask_dist.masking.families.base import Family
from selfmask_dist.masking.pieces import Segment, Shards, Whole

First = float | Tensor | Callable[[Tensor], Tensor]  # first scores; a callable makes them of the whole weight


class MaskedParameter:
    """One parameter under a mask: theta (the module's own), the weight W and the scores S.

    What of W, S and the small numbers is trained is a parameter that requires grad; see `Family`.
    """

    def __init__(
        self,
        name: str,
        theta: nn.Parameter,
        init: First,
        num_segments: int,
        shards: Shards,
        family: Family,
        other: Tensor | None = None,
    ) -> None:
        self.name = name
        self.theta = theta
        self.shards = shards
        self.weight: Tensor = theta.detach().clone()
        # float32: bf16 would round small updates of a score near 1 away
        dtype = torch.float64 if theta.dtype == torch.float64 else torch.float32
        scores = shards.new_scores(name, self.weight, dtype)
        self.scores = nn.Parameter(scores, requires_grad=family.trains_scores)
        self.num_segments = num_segments
        piece = self.piece(self.scores)
        self._first_row = shards.first_row(name, theta)
        self._row = math.prod(piece.shape[1:])  # elements of one
        self._num_rows = theta.numel() // self._row if self._row else 0  # of the whole tensor
        self.wholes = [Whole(size, self._segment_shape(size)) for size in self.segment_sizes()]
        if callable(init):
            init = init(shards.whole_weight(name, self.weight))
        self.fill(init)
        self.numbers = self._first_numbers(family)
        self.other = None if other is None else self._second(other)
        self.first_weight = self.weight  # as it was before training
        if family.trains_weight:
            self.weight = nn.Parameter(self.piece(self.weight).clone())
            self.first_weight = self.piece(self.first_weight).cpu()  # only for the mask file

    @property
    def num_kept(self) -> list[Tensor]:
        """Return the number of kept weights of each segment of the whole tensor, 0-d float64."""
        return [whole.kept for whole in self.wholes]

    @property
    def scales(self) -> list[Tensor]:
        """Return the scale a of each segment of the whole tensor, 0-d, of theta's dtype."""
        return [whole.scale for whole in self.wholes]

    def piece(self, tensor: Tensor) -> Tensor:
        """Return this process's piece of theta, the weight, the scores, or a gradient of one of them."""
        return self.shards.piece(self.name, tensor)

    def bounds(self) -> list[tuple[int, int]]:
        """Return for each segment which rows of this process's piece belong to it: (first, last + 1)."""
        length = -(-self._num_rows // self.num_segments)
        rows = len(self.piece(self.scores))

        def within(row: int) -> int:
            return min(max(row - self._first_row, 0), rows)

        return [(within(i * length), within((i + 1) * length)) for i in range(self.num_segments)]

    def split(self, piece: Tensor) -> list[Tensor]:
        """Return views of a piece, one for each segment; those that this process has nothing of are empty."""
        if self.num_segments == 1:
            return [piece]
        return [piece[start:stop] for start, stop in self.bounds()]

    def segment_sizes(self) -> list[int]:
        """Return N of each segment of the whole tensor."""
        length = -(-self._num_rows // self.num_segments)
        starts = [min(i * length, self._num_rows) for i in range(self.num_segments + 1)]
        return [(stop - start) * self._row for start, stop in itertools.pairwise(starts)]

    def starts(self) -> list[int]:
        """Return where this process's piece of each segment begins in the whole segment, in elements."""
        length = -(-self._num_rows // self.num_segments)
        return [max(self._first_row - i * length, 0) * self._row for i in range(self.num_segments)]

    def segments(self) -> list[Segment]:
        """Return this process's piece of each segment, as views."""
        tensors = (self.theta.detach(), self.weight.detach(), self.scores.detach())
        thetas, weights, scores = (self.split(self.piece(tensor)) for tensor in tensors)
        numbers: Sequence[Tensor | None] = [None] * self.num_segments
        if self.numbers is not None:
            numbers = self.numbers.detach().unbind()
        others = [None] * self.num_segments if self.other is None else self.split(self.other)
        parts = zip(thetas, weights, scores, self.wholes, self.starts(), numbers, others, strict=True)
        return [Segment(*part) for part in parts]

    @torch.no_grad()
    def fill(self, values: float | Tensor, *, of: Tensor | None = None) -> None:
        """Set the scores, or the trained weight, to one number or to this process's piece of a whole tensor.

        Args:
            values: a number, or a tensor of the parameter's shape.
            of: the tensor to set; None for the scores.
        """
        piece = self.piece(self.scores if of is None else of)
        if not isinstance(values, Tensor):
            piece.fill_(values)
            return
        piece.copy_(self._part_of(values, piece))

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Set all that is trained from whole tensors, by the keys of `state_shapes`."""
        self.fill(state[self.name])
        if isinstance(self.weight, nn.Parameter):
            self.fill(state[f"{self.name}:weight"], of=self.weight)
        if self.numbers is not None:
            self.numbers.copy_(state[f"{self.name}:numbers"])

    @torch.no_grad()
    def release(self, *, restore: bool) -> None:
        """Freeze theta; `restore` makes it the weight that it was before training."""
        if restore:
            self.piece(self.theta).copy_(self.piece(self.first_weight))
        self.theta.grad = None
        self.theta.requires_grad_(False)

    def state_shapes(self) -> dict[str, torch.Size]:
        """Return the shapes of the whole tensors that `state_dict` has of this parameter, by their keys."""
        shapes = {self.name: self.theta.shape}
        if isinstance(self.weight, nn.Parameter):
            shapes[f"{self.name}:weight"] = self.theta.shape
        if self.numbers is not None:
            shapes[f"{self.name}:numbers"] = self.numbers.shape
        return shapes

    def _part_of(self, values: Tensor, piece: Tensor) -> Tensor:
        """Return the part of a whole tensor, or of a piece, that lies where `piece` does."""
        if values.shape == piece.shape:
            return values
        # rows of a piece: of the whole tensor, or of the flattened one
        values = values.reshape(-1, *piece.shape[1:])
        return values[self._first_row : self._first_row + len(piece)]

    def _second(self, other: Tensor) -> Tensor:
        """Return this process's piece of second frozen weights, given whole, as the weight's piece is."""
        piece = torch.empty_like(self.piece(self.weight))
        return piece.copy_(self._part_of(other.detach(), piece))

    def _segment_shape(self, size: int) -> torch.Size:
        row = self.theta.shape[1:].numel()
        return torch.Size((size // row if row else 0, *self.theta.shape[1:]))

    def _first_numbers(self, family: Family) -> nn.Parameter | None:
        """Return the small trained tensors of all segments, (segments, numbers); the same on all ranks."""
        if type(family).first_numbers is Family.first_numbers:
            return None
        whole = self.shards.whole_weight(self.name, self.weight)
        rows = [
            family.first_numbers(state.shape, part)
            for state, part in zip(self.wholes, whole.chunk(self.num_segments), strict=True)
        ]
        return nn.Parameter(torch.stack([row for row in rows if row is not None]))
