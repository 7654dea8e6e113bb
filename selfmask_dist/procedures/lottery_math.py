"""Lottery tickets: prune a trained network by magnitude, rewind what is left to step k, train it again.

    w_T = train(w_k * m)      m := m without the smallest |w_T|      w := w_k * m      ... for each round

k = 0 is the first version (Frankle, Carbin, "The Lottery Ticket Hypothesis", ICLR 2019, arXiv 1803.03635,
section 1); deep networks need some early k (Frankle, Dziugaite, Roy, Carbin, "Linear Mode Connectivity and
the Lottery Ticket Hypothesis", ICML 2020, arXiv 1912.05671, section 4). After r rounds that prune a share p,
(1 - p)^r of the weights is left. Pure functions on tensors by name; knows no files and no training loop.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from selfmask_dist.training.hold import FREE, ZERO, keep_largest

Mask = dict[str, Tensor]


def whole(weights: Mapping[str, Tensor]) -> Mask:
    """The mask of the first round: nothing is pruned."""
    return {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}


def prune(weights: Mapping[str, Tensor], mask: Mask, share: float, *, scope: str = "global") -> Mask:
    """The mask without a `share` of what it keeps, the smallest by magnitude.

    Args:
        scope: `global`: of all weights together (deep networks), `tensor`: of each tensor.

    Raises:
        ValueError: a share that is not above 0 and below 1.
    """
    if not 0 < share < 1:
        raise ValueError(f"the share to prune in a round must lie between 0 and 1, got {share}")
    return keep_largest(weights, mask, 1 - share, scope=scope)


def rewind(at_k: Mapping[str, Tensor], mask: Mask) -> dict[str, Tensor]:
    """w_k * m for the pruned names, w_k for the others."""
    return {
        name: torch.where(mask[name], tensor, 0) if name in mask else tensor.clone()
        for name, tensor in at_k.items()
    }


def codes(mask: Mask) -> dict[str, Tensor]:
    """What training has to keep at zero."""
    return {name: torch.where(kept, FREE, ZERO).to(torch.int8) for name, kept in mask.items()}
