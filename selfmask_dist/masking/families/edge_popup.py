"""Edge-popup: the share k of the weights with the largest |S| is kept, exactly, in each tensor or over all.

Ramanujan et al. 2020, "What's Hidden in a Randomly Weighted Neural Network?", arXiv 1911.13299.

    M = 1[|S| among the k N largest]        theta = W * M  or  a * W * M, a = (N / sum M)^(1/2)
    dL/dS = sign(S) * a * G * W

The number kept is fixed, so a is a constant; with it frozen random weights are scaled by 1 / k^(1/2), as
published. The sign is of |S|, as in the authors' code.
"""

from typing import ClassVar

from torch import Tensor

from selfmask_dist.masking.families.topk import TopK
from selfmask_dist.masking.segment import Segment


class EdgePopup(TopK):
    """Top k by |S|."""

    name: ClassVar[str] = "edge_popup"
    reads_scores: ClassVar[bool] = True

    def ranked(self, segment: Segment) -> Tensor:
        return segment.scores.abs()

    def pull_back(self, segment: Segment, grad: Tensor, back: Tensor | None, out: Tensor) -> None:
        super().pull_back(segment, grad, back, out)
        out.mul_(segment.scores.sign())
