"""A mask that is trained together with the weights under it, as a regulariser of fine-tuning.

It is the default family's mask on weights that move (gate variables beside weights: Srinivas, Subramanya,
Babu 2017, arXiv 1611.06694).

    M = 1[S > mu]        theta = a * W * M, a = (N / sum M)^(1/2)
    dL/dS = a * G * W - <G, theta> / (2 * sum M)        dL/dW = a * G * M
"""

from typing import ClassVar

import torch
from torch import Tensor

from selfmask_dist.masking.families.threshold import Threshold
from selfmask_dist.masking.pieces import Segment


class Joint(Threshold):
    """`Threshold`, and W is trained too."""

    name: ClassVar[str] = "joint"
    form: ClassVar[str] = "values"
    is_mask: ClassVar[bool] = False
    trains_weight: ClassVar[bool] = True

    def finish(self, segment: Segment) -> None:
        super().finish(segment)
        segment.theta.add_(0.0)  # -0 becomes 0, as a file gives it back

    def pull_back_weight(self, segment: Segment, grad: Tensor, back: Tensor | None, out: Tensor) -> None:
        torch.mul(grad.to(out.dtype), self.mask(segment), out=out)
        if self.is_scaled:
            out.mul_(segment.whole.scale)
