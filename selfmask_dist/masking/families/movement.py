"""Movement pruning (Sanh, Wolf, Rush 2020, arXiv 2005.07683).

Weights are trained, and scores add up how far each of them moves away from zero.

    hard    M = 1[S among the v N largest]         v falls from 1 along a cubic schedule, see `FamilyOptions`
    soft    M = 1[sigmoid(S) > tau]                tau rises from 0 along the same schedule
            and the loss gains lambda tau_now / tau * mean over tensors of mean sigmoid(S)
    theta = W * M        dL/dW = G * M        dL/dS = G * W, for pruned weights too

As in the authors' code, lambda follows tau.
"""

from typing import ClassVar

import torch
from torch import Tensor

from selfmask_dist.masking import core
from selfmask_dist.masking.families.base import Family, FamilyOptions
from selfmask_dist.masking.families.topk import TopK
from selfmask_dist.masking.pieces import Segment


def write_kept(segment: Segment, mask: Tensor) -> Tensor:
    """Write theta = W where M = 1, else 0, and return sum M as `Family.write` does."""
    segment.theta.copy_(segment.weight).masked_fill_(~mask, 0)  # a product would leave -0
    return core.count_kept(mask).view(1)


class Movement(TopK):
    """Hard: top v by S."""

    name: ClassVar[str] = "movement"
    form: ClassVar[str] = "values"
    is_mask: ClassVar[bool] = False
    trains_weight: ClassVar[bool] = True

    @property
    def is_scaled(self) -> bool:
        return False

    def write(self, segment: Segment) -> Tensor:
        return write_kept(segment, self.mask(segment))

    def pull_back_weight(self, segment: Segment, grad: Tensor, back: Tensor | None, out: Tensor) -> None:
        torch.mul(grad.to(out.dtype), self.mask(segment), out=out)


class SoftMovement(Family):
    """Soft: a threshold on sigmoid(S), with a penalty on sigmoid(S)."""

    name: ClassVar[str] = "soft_movement"
    form: ClassVar[str] = "values"
    is_mask: ClassVar[bool] = False
    trains_weight: ClassVar[bool] = True

    def __init__(self, options: FamilyOptions | None = None) -> None:
        super().__init__(options or FamilyOptions(threshold=0.1))
        if not 0 < self.options.threshold < 1:
            raise ValueError(
                f"soft_movement compares sigmoid(S) with mask.threshold, which is "
                f"{self.options.threshold:g}; set it between 0 and 1, as 0.1"
            )

    @property
    def is_scaled(self) -> bool:
        return False

    def progress(self, step: int) -> float:
        """Return how far tau has come at a step, from 0 to 1, by the schedule of the kept share."""
        return 1 - self.left(step)

    def mask(self, segment: Segment) -> Tensor:
        tau = self.options.threshold * self.progress(segment.whole.step)
        return core.binarize(segment.scores.sigmoid(), tau)

    def pull_back(self, segment: Segment, grad: Tensor, back: Tensor | None, out: Tensor) -> None:
        torch.mul(grad.to(out.dtype), segment.weight.to(out.dtype), out=out)
        whole = segment.whole
        factor = self.options.penalty * self.progress(whole.step) / (whole.numel * whole.num_tensors)
        if factor:
            kept = segment.scores.sigmoid()
            out.addcmul_(kept, 1 - kept, value=factor)

    def write(self, segment: Segment) -> Tensor:
        return write_kept(segment, self.mask(segment))

    def pull_back_weight(self, segment: Segment, grad: Tensor, back: Tensor | None, out: Tensor) -> None:
        torch.mul(grad.to(out.dtype), self.mask(segment), out=out)
