"""Grafting: each weight is the pretrained or the fine-tuned one.

After Panigrahi et al. 2023, "Task-Specific Skill Localization in Fine-tuned Language Models",
arXiv 2302.06600.

    M = 1[S > mu]        theta = W + M * (V - W): W pretrained, V fine-tuned, both frozen
    dL/dS = G * (V - W)

Written by choosing, not by adding, so that all ones and all zeros are the two models bit for bit. Panigrahi
et al. relax M by a sigmoid; here it is straight through, as in this project's default.
"""

from typing import ClassVar

import torch
from torch import Tensor

from selfmask_dist.masking import core
from selfmask_dist.masking.families.base import Family
from selfmask_dist.masking.pieces import Segment


class Graft(Family):
    """Needs `other`, the fine-tuned weights, when it is attached."""

    name: ClassVar[str] = "graft"
    form: ClassVar[str] = "graft"
    is_mask: ClassVar[bool] = False
    has_threshold: ClassVar[bool] = True
    needs_other: ClassVar[bool] = True

    @property
    def is_scaled(self) -> bool:
        return False

    def mask(self, segment: Segment) -> Tensor:
        return core.binarize(segment.scores, self.options.threshold)

    def distance(self, segment: Segment) -> Tensor:
        return segment.scores - self.options.threshold

    def write(self, segment: Segment) -> Tensor:
        assert segment.other is not None
        mask = self.mask(segment)
        torch.where(mask, segment.other, segment.weight, out=segment.theta)
        return core.count_kept(mask).view(1)

    def finish(self, segment: Segment) -> None:
        pass

    def pull_back(self, segment: Segment, grad: Tensor, back: Tensor | None, out: Tensor) -> None:
        assert segment.other is not None
        torch.mul(grad.to(out.dtype), (segment.other - segment.weight).to(out.dtype), out=out)
