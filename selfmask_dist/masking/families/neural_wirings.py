"""Discovering neural wirings (Wortsman, Farhadi, Rastegari 2019, arXiv 1906.00586).

The weights of largest magnitude are used, and all are trained, so that what was left out may come back.

    M = 1[|L| among the k N largest]        theta = L * M        dL/dL = G, of kept and left out alike

L starts as the pretrained weight.
"""

from typing import ClassVar

from torch import Tensor

from selfmask_dist.masking import core
from selfmask_dist.masking.families.topk import TopK
from selfmask_dist.masking.pieces import Segment


class NeuralWirings(TopK):
    """Top k by |L| of a latent L."""

    name: ClassVar[str] = "neural_wirings"
    form: ClassVar[str] = "values"
    is_mask: ClassVar[bool] = False
    starts_from_weight: ClassVar[bool] = True

    @property
    def is_scaled(self) -> bool:
        return False

    def ranked(self, segment: Segment) -> Tensor:
        return segment.scores.abs()

    def write(self, segment: Segment) -> Tensor:
        mask = self.mask(segment)
        segment.theta.copy_(segment.scores).masked_fill_(~mask, 0)  # a product would leave -0
        return core.count_kept(mask).view(1)

    def pull_back(self, segment: Segment, grad: Tensor, back: Tensor | None, out: Tensor) -> None:
        out.copy_(grad)
