"""Self-Masking (Warmerdam et al. 2024): M = 1[S > mu], theta = a * W * M, a = (N / sum M)^(1/2).

dL/dS = a * G * W - <G, theta> / (2 * sum M)          formula (*) of `core`
"""

from typing import ClassVar

from torch import Tensor

from selfmask_dist.masking import core
from selfmask_dist.masking.families.base import Family
from selfmask_dist.masking.segment import Segment


class Threshold(Family):
    """The default."""

    name: ClassVar[str] = "threshold"
    has_threshold: ClassVar[bool] = True

    @property
    def has_back_sums(self) -> bool:
        return self.options.scale == "through"

    def mask(self, segment: Segment) -> Tensor:
        return core.binarize(segment.scores, self.options.threshold)

    def distance(self, segment: Segment) -> Tensor:
        return segment.scores - self.options.threshold

    def write(self, segment: Segment) -> Tensor:
        num_kept = core.write_mask(segment.scores, self.options.threshold, out=segment.theta)
        segment.theta.mul_(segment.weight)
        return num_kept.view(1)

    def back_sums(self, segment: Segment, grad: Tensor) -> Tensor:
        return core.inner_product(grad, segment.theta).view(1)

    def pull_back(self, segment: Segment, grad: Tensor, back: Tensor | None, out: Tensor) -> None:
        core.pullback(
            grad,
            segment.weight,
            scale=segment.whole.scale if self.is_scaled else None,
            grad_dot_theta=None if back is None else back[0],
            num_kept=segment.whole.kept,
            out=out,
        )
