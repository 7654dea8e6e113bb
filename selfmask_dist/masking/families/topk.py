"""Families that keep an exact share of the weights, those ranked highest; a subclass says by what.

    M = 1[rank of S among the k N largest], ties by index        theta = W * M  or  a * W * M
    dL/dS = a * G * W                                            straight through; a = (N / sum M)^(1/2)

The number kept is fixed, so a is a constant and no gradient goes through it; with it frozen random weights
are scaled by 1 / k^(1/2).

Edge-popup (Ramanujan et al. 2020, "What's Hidden in a Randomly Weighted Neural Network?", arXiv 1911.13299)
ranks by |S|, whose sign goes into the gradient as in the authors' code: dL/dS = sign(S) * a * G * W.
"""

from typing import ClassVar

import torch
from torch import Tensor

from selfmask_dist.masking import core
from selfmask_dist.masking.families.base import Family
from selfmask_dist.masking.pieces import Segment


class TopK(Family):
    """Top k by S."""

    name: ClassVar[str] = "topk"
    ranks: ClassVar[bool] = True

    def ranked(self, segment: Segment) -> Tensor:
        return segment.scores

    def distance(self, segment: Segment) -> Tensor:
        assert segment.whole.cut is not None
        return self.ranked(segment) - segment.whole.cut.value

    def mask(self, segment: Segment) -> Tensor:
        ranked = self.ranked(segment)
        assert segment.whole.cut is not None
        return segment.whole.cut.write(ranked, out=torch.empty_like(ranked, dtype=torch.bool))

    def write(self, segment: Segment) -> Tensor:
        assert segment.whole.cut is not None
        segment.whole.cut.write(self.ranked(segment), out=segment.theta)
        num_kept = core.count_kept(segment.theta)
        segment.theta.mul_(segment.weight)
        return num_kept.view(1)


class EdgePopup(TopK):
    """Edge-popup: top k by |S|."""

    name: ClassVar[str] = "edge_popup"
    reads_scores: ClassVar[bool] = True

    def ranked(self, segment: Segment) -> Tensor:
        return segment.scores.abs()

    def pull_back(self, segment: Segment, grad: Tensor, back: Tensor | None, out: Tensor) -> None:
        super().pull_back(segment, grad, back, out)
        out.mul_(segment.scores.sign())
