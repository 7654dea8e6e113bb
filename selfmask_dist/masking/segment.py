"""What a mask family works on: this process's piece of one scaled tensor, and numbers of the whole of it."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from selfmask_dist.masking.ranking import Cut

_NONE = torch.zeros(0)


@dataclass
class Whole:
    """One scaled tensor as all ranks see it, from one writing of theta to the next.

    numel, shape: of the whole tensor.
    measured: what `Family.measure` gave, summed over pieces, 1-D.
    cut: of families that rank: which of this process's piece are kept.
    sums: what `Family.write` gave, summed over pieces, 1-D float64; the first is the number of kept weights.
    kept: sums[0], 0-d.
    scale: a = (numel / kept)^(1/2), 0-d, of theta's dtype.
    step: of the forward that theta is for, from 0.
    num_tensors: scaled tensors of the model in all.
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
    """The piece: views of tensors of this process, all of one shape.

    Where a tensor is cut, a piece holds consecutive rows of it, or (engine bits) consecutive elements, flat.

    numbers: small trained tensor of families that have one, 1-D, the same on all ranks.
    start: index of the piece's first element in the whole tensor, flattened.
    other: second frozen weights, of families that have them.
    """

    theta: Tensor
    weight: Tensor
    scores: Tensor
    whole: Whole
    start: int = 0
    numbers: Tensor | None = None
    other: Tensor | None = None
