"""Ternary weights: theta is 0, positive or negative, of one or two sizes a tensor; a latent L is trained.

    TWN (Li, Zhang, Liu 2016, arXiv 1605.04711)
        d = 0.7 mean |L|        M = 1[|L| > d]        theta = s * sign(L) * M, s = mean |L| where M = 1
        dL/dL = G
    TTQ (Zhu, Han, Mao, Dally 2017, arXiv 1612.01064)
        d = t max |L|, t = 0.05        theta = p where L > d, -n where L < -d, else 0
        dL/dp = sum of G where L > d        dL/dn = -sum of G where L < -d
        dL/dL = p G, n G or G, in the same three cases

L starts as the pretrained weight, p and n as the mean |L| of the weights that they stand for. Eq. 7 of TTQ
prints dL/dn without its minus; it is the derivative of theta = -n, and p and n are kept from below zero. The
optimizer gets both divided by the number of weights summed over: p then steps as the mean of the weights that
it stands for would, TWN's s. With the sum itself one step moves thousands of weights by thousands of times
what each asks for, and p and n end at 0 in some tensors.
"""

from typing import ClassVar

import torch
from torch import Tensor

from selfmask_dist.masking import core
from selfmask_dist.masking.families.base import Family
from selfmask_dist.masking.pieces import Segment

TWN_FACTOR = 0.7
TTQ_FACTOR = 0.05


def ternarize(latent: Tensor, delta: Tensor | float) -> Tensor:
    """Return 1 where L > delta, -1 where L < -delta, else 0; the shape and dtype of `latent`."""
    return latent.sign().masked_fill_(latent.abs() <= delta, 0)


class TernaryWeights(Family):
    """TWN."""

    name: ClassVar[str] = "twn"
    form: ClassVar[str] = "ternary"
    is_mask: ClassVar[bool] = False
    starts_from_weight: ClassVar[bool] = True

    def measure(self, segment: Segment) -> Tensor:
        return segment.scores.abs().sum(dtype=torch.float64).view(1)

    def delta(self, segment: Segment) -> Tensor:
        """Return the threshold of |L|, 0-d, of its dtype."""
        assert segment.whole.measured is not None
        return (TWN_FACTOR * segment.whole.measured[0] / segment.whole.numel).to(segment.scores.dtype)

    def mask(self, segment: Segment) -> Tensor:
        return segment.scores.abs() > self.delta(segment)

    def write(self, segment: Segment) -> Tensor:
        signs = ternarize(segment.scores, self.delta(segment))
        segment.theta.copy_(signs)
        return torch.stack([core.count_kept(signs.abs()), (signs * segment.scores).sum(dtype=torch.float64)])

    def finish(self, segment: Segment) -> None:
        num_kept, total = segment.whole.sums
        segment.theta.mul_((total / num_kept.clamp(min=1)).to(segment.theta.dtype))

    def pull_back(self, segment: Segment, grad: Tensor, back: Tensor | None, out: Tensor) -> None:
        out.copy_(grad)


class TrainedTernary(TernaryWeights):
    """TTQ; `numbers` are p and n."""

    name: ClassVar[str] = "ttq"
    measures_largest: ClassVar[bool] = True
    moves_scores: ClassVar[bool] = True

    @property
    def has_back_sums(self) -> bool:
        return True

    def first_numbers(self, shape: torch.Size, weight: Tensor) -> Tensor:
        delta = TTQ_FACTOR * weight.abs().max()
        above, below = weight > delta, weight < -delta
        sizes = [(weight.abs() * part).sum() / part.sum().clamp(min=1) for part in (above, below)]
        return torch.stack(sizes).to(torch.promote_types(weight.dtype, torch.float32))

    def measure(self, segment: Segment) -> Tensor:
        scores = segment.scores
        largest = scores.abs().amax() if scores.numel() else scores.new_zeros(())
        return largest.double().view(1)

    def delta(self, segment: Segment) -> Tensor:
        assert segment.whole.measured is not None
        return (TTQ_FACTOR * segment.whole.measured[0]).to(segment.scores.dtype)

    def write(self, segment: Segment) -> Tensor:
        assert segment.numbers is not None
        signs = ternarize(segment.scores, self.delta(segment))
        positive, negative = segment.numbers.to(signs.dtype)
        segment.theta.copy_(torch.where(signs > 0, positive, torch.where(signs < 0, -negative, signs)))
        return core.count_kept(signs.abs()).view(1)

    def finish(self, segment: Segment) -> None:
        pass

    def back_sums(self, segment: Segment, grad: Tensor) -> Tensor:
        delta = self.delta(segment)
        above, below = segment.scores > delta, segment.scores < -delta
        sums = [(grad * part).sum(dtype=torch.float64) for part in (above, below)]
        return torch.stack([*sums, core.count_kept(above), core.count_kept(below)])

    def pull_back(self, segment: Segment, grad: Tensor, back: Tensor | None, out: Tensor) -> None:
        assert segment.numbers is not None
        signs = ternarize(segment.scores, self.delta(segment))
        positive, negative = segment.numbers.to(out.dtype)
        torch.mul(
            grad.to(out.dtype), 1 + (signs > 0) * (positive - 1) + (signs < 0) * (negative - 1), out=out
        )

    def pull_back_numbers(self, segment: Segment, back: Tensor | None, out: Tensor) -> None:
        assert back is not None
        (up, down), counts = back[:2], back[2:].clamp(min=1)
        out.copy_(torch.stack([up, -down]) / counts)

    def after_step(self, segment: Segment) -> None:
        assert segment.numbers is not None
        segment.numbers.clamp_(min=0)
