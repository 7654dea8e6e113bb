"""BinaryConnect (Courbariaux, Bengio, David 2015, arXiv 1511.00363): signs of a latent L that is trained.

    theta = 1 where L >= 0, else -1        dL/dL = G        L is clipped to [-1, 1] after each step

With a scale (any `scale` but none), theta = mean |L| of the tensor times that (Rastegari et al. 2016, arXiv
1603.05279), which a pretrained network needs: its weights are far smaller than 1. L starts as the pretrained
weight.
"""

from typing import ClassVar

import torch
from torch import Tensor

from selfmask_dist.masking.families.base import Family
from selfmask_dist.masking.pieces import Segment


class BinaryConnect(Family):
    """Every weight is kept; what is learned is its sign."""

    name: ClassVar[str] = "binary_connect"
    form: ClassVar[str] = "sign"
    is_mask: ClassVar[bool] = False
    starts_from_weight: ClassVar[bool] = True
    moves_scores: ClassVar[bool] = True

    def mask(self, segment: Segment) -> Tensor:
        return torch.ones_like(segment.scores, dtype=torch.bool)

    def write(self, segment: Segment) -> Tensor:
        segment.theta.copy_(segment.scores >= 0).mul_(2).sub_(1)
        total = segment.scores.abs().sum(dtype=torch.float64)
        return torch.stack([total.new_tensor(segment.scores.numel()), total])

    def finish(self, segment: Segment) -> None:
        if self.is_scaled:
            num_weights, total = segment.whole.sums
            segment.theta.mul_((total / num_weights).to(segment.theta.dtype))

    def pull_back(self, segment: Segment, grad: Tensor, back: Tensor | None, out: Tensor) -> None:
        out.copy_(grad)

    def after_step(self, segment: Segment) -> None:
        segment.scores.clamp_(-1, 1)
