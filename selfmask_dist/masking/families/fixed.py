"""Masks that are not trained, to compare with: k N weights, at random or those of largest magnitude.

    random      M = 1[U among the k N largest], U uniform, from the seed
    magnitude   M = 1[|W| among the k N largest]    (Han et al. 2015, arXiv 1506.02626, without retraining)

theta = W * M or a * W * M; only what stands on top of the encoder is trained.
"""

from typing import ClassVar

import torch
from torch import Tensor

from selfmask_dist.common.seeding import named_generator
from selfmask_dist.masking.families.topk import TopK
from selfmask_dist.masking.pieces import Segment


class RandomMask(TopK):
    """Fixed, at random."""

    name: ClassVar[str] = "random"
    trains_scores: ClassVar[bool] = False

    def first_scores(self, name: str, weight: Tensor) -> Tensor:
        return torch.rand(weight.shape, generator=named_generator(self.options.seed, f"random mask/{name}"))


class MagnitudeMask(TopK):
    """Fixed, by magnitude."""

    name: ClassVar[str] = "magnitude"
    trains_scores: ClassVar[bool] = False

    def ranked(self, segment: Segment) -> Tensor:
        return segment.weight.abs()
