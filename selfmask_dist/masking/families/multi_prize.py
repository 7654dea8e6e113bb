"""Multi-prize tickets (Diffenderfer, Kailkhura 2021, arXiv 2103.09377): a binary network inside a frozen one.

    M = 1[|S| among the k N largest]        theta = s * M * sign(W)        s = sum |M W| / sum M
    dL/dS = sign(S) * G * W

k, scores and their ranking are edge-popup's, and so is the gradient (as in the authors' code), s a constant.
"""

from typing import ClassVar

import torch
from torch import Tensor

from selfmask_dist.masking import core
from selfmask_dist.masking.families.topk import EdgePopup
from selfmask_dist.masking.pieces import Segment


class MultiPrize(EdgePopup):
    """Top k by |S| of the signs of frozen weights."""

    name: ClassVar[str] = "multi_prize"
    form: ClassVar[str] = "frozen_sign"
    is_mask: ClassVar[bool] = False

    @property
    def is_scaled(self) -> bool:
        return False  # by a = (N / sum M)^(1/2): it has a scale of its own

    def write(self, segment: Segment) -> Tensor:
        mask = self.mask(segment)
        # zeros are filled in: a product would leave -0 in place of 0
        segment.theta.copy_(segment.weight).masked_fill_(~mask, 0)
        total = segment.theta.abs().sum(dtype=torch.float64)
        segment.theta.sign_()
        return torch.stack([core.count_kept(mask), total])

    def finish(self, segment: Segment) -> None:
        num_kept, total = segment.whole.sums
        segment.theta.mul_((total / num_kept.clamp(min=1)).to(segment.theta.dtype))
