"""Mixup and CutMix of two views, by numbers that a generator gives.

    mixup    x = lambda x_1 + (1 - lambda) x_2                          lambda ~ Beta(a, a)
    CutMix   x = x_1 with a rectangle of x_2, whose area is 1 - lambda of the view before it is cut off at the
             edges; lambda is then the share of x_1 that is left

Zhang et al. 2018 (arXiv 1710.09412) and Yun et al. 2019 (arXiv 1905.04899), as `timm.data.Mixup` has them by
element: each view has a lambda of its own. Who is mixed with whom is `order`'s to say. Knows no labels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

Box = tuple[int, int, int, int]  # top, left, bottom, right


@dataclass(frozen=True)
class Mixing:
    """How views are mixed.

    mixup, cutmix: a of Beta(a, a), 0 for never. probability: of being mixed at all. switch: share of CutMix
    among the mixed ones, where both are above 0.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    probability: float = 1.0
    switch: float = 0.5

    def __call__(self, own: Tensor, other: Tensor, rng: np.random.Generator) -> tuple[Tensor, float]:
        """Return own (3, h, w) mixed with other (3, h, w), as a new tensor, and the share of its own."""
        is_mixed, is_cut, quantile, down, right = rng.random(5).tolist()  # always five, whatever is used
        if is_mixed >= self.probability:
            return own, 1.0
        cuts = self.cutmix > 0 and (self.mixup == 0 or is_cut < self.switch)
        share = _beta(self.cutmix if cuts else self.mixup, quantile)
        if not cuts:
            return share * own + (1 - share) * other, share
        top, left, bottom, right_edge = cut_box(own.shape[-2], own.shape[-1], share, (down, right))
        mixed = own.clone()
        mixed[:, top:bottom, left:right_edge] = other[:, top:bottom, left:right_edge]
        area = (bottom - top) * (right_edge - left)
        return mixed, 1 - area / (own.shape[-2] * own.shape[-1])


def cut_box(height: int, width: int, share: float, place: tuple[float, float]) -> Box:
    """Return the rectangle that CutMix pastes, cut off at the edges.

    Args:
        share: lambda; the rectangle's sides are sqrt(1 - lambda) of the view's.
        place: of its centre, down and to the right, in [0, 1) of the view.
    """
    side = math.sqrt(1 - share)
    tall, wide = int(height * side), int(width * side)
    middle, centre = int(place[0] * height), int(place[1] * width)
    top, left = max(middle - tall // 2, 0), max(centre - wide // 2, 0)
    return top, left, min(middle + (tall + 1) // 2, height), min(centre + (wide + 1) // 2, width)


def _beta(a: float, quantile: float) -> float:
    """Return the value of Beta(a, a) at a quantile: one uniform number gives it, and no rejection."""
    # here, as most runs need no scipy in their workers
    from scipy.special import betaincinv  # type: ignore[import-untyped]

    return float(betaincinv(a, a, quantile))
