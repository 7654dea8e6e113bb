"""Families that compare each score with one threshold: M = 1[S > mu].

Self-Masking (Warmerdam et al. 2024)

    theta = a * W * M, a = (N / sum M)^(1/2)
    dL/dS = a * G * W - <G, theta> / (2 * sum M)          formula (*) of `core`

Piggyback (Mallya, Davis, Lazebnik 2018, arXiv 1801.06519) is the same without a scale:

    theta = W * M        dL/dS = G * W        as published, S starts at 0.01 and mu is 0.005
"""

from typing import ClassVar

from torch import Tensor

from selfmask_dist.masking import core
from selfmask_dist.masking.families.base import Family, FamilyOptions
from selfmask_dist.masking.pieces import Segment


class Threshold(Family):
    """Self-Masking; the default."""

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

    def shift(self, segment: Segment, back: Tensor) -> Tensor:
        return core.shift_of(back[0], segment.whole.kept)

    def pull_back(self, segment: Segment, grad: Tensor, back: Tensor | None, out: Tensor) -> None:
        core.pullback(
            grad,
            segment.weight,
            scale=segment.whole.scale if self.is_scaled else None,
            grad_dot_theta=None if back is None else back[0],
            num_kept=segment.whole.kept,
            out=out,
        )


class Piggyback(Threshold):
    """Piggyback."""

    name: ClassVar[str] = "piggyback"

    def __init__(self, options: FamilyOptions | None = None) -> None:
        options = options or FamilyOptions(threshold=5e-3, scale="none")
        if options.scale != "none":
            raise ValueError(f"piggyback has no scale; set scale=none in place of {options.scale}")
        super().__init__(options)
