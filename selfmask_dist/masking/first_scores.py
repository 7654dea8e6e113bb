"""The first scores of a whole parameter, and which weights may be pruned at all.

    constant               S = v
    normal                 S = mu + |z|, z normal, scaled to mean 1
    magnitude              S = mu + |W| / mean |W|
    shuffled_magnitude     the same numbers in random places
    kaiming_uniform        S uniform in +-1 / fan_in^(1/2) (edge-popup, Ramanujan et al. 2020)

All but the last lie above the threshold, 1 from it on average as the default does, so that every weight but
zeros starts kept. Made on the CPU from a whole tensor and a generator of (seed, name): the same on any number
of ranks.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from selfmask_dist.common.seeding import named_generator
from selfmask_dist.masking.families.base import Family

NAMES = ("normal", "magnitude", "shuffled_magnitude", "kaiming_uniform")


def check_kind(kind: str) -> None:
    """Raise a ValueError where `kind` is no kind of first scores."""
    if kind not in NAMES:
        raise ValueError(f"init {kind!r} is neither a number nor one of {', '.join(NAMES)}")


def starter(init: float | str, name: str, family: Family) -> float | Callable[[Tensor], Tensor]:
    """Return the first scores of a parameter: a number where they are all equal, else a function of W."""
    options = family.options
    is_own = type(family).first_scores is not Family.first_scores or family.starts_from_weight
    if not is_own and not isinstance(init, str) and options.maskable == 1:
        return init

    def start(weight: Tensor) -> Tensor:
        weight = weight.detach().cpu()
        scores = family.first_scores(name, weight) if is_own else None
        if scores is None:
            scores = first_scores(init, name, weight, threshold=options.threshold, seed=options.seed)
        if options.maskable < 1:
            scores = scores.clone()
            keep_always(
                scores, name, weight, maskable=options.maskable, by=options.maskable_by, seed=options.seed
            )
        return scores

    return start


def first_scores(kind: str | float, name: str, weight: Tensor, *, threshold: float, seed: int) -> Tensor:
    """Return scores in the shape of the whole `weight` of parameter `name`, on the CPU.

    Args:
        kind: one of `NAMES`, or a number for all scores.

    Raises:
        ValueError: an unknown kind.
    """
    weight = weight.detach().cpu()
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    generator = named_generator(seed, f"first scores/{name}")
    if not isinstance(kind, str):
        return torch.full(weight.shape, kind, dtype=dtype)
    if kind == "kaiming_uniform":
        bound = 1 / math.sqrt(max(weight.numel() / max(len(weight), 1), 1)) if weight.ndim else 1.0
        return (torch.rand(weight.shape, generator=generator, dtype=dtype) * 2 - 1) * bound
    if kind == "normal":
        away = torch.randn(weight.shape, generator=generator, dtype=dtype).abs()
        return threshold + away * math.sqrt(math.pi / 2)
    check_kind(kind)
    away = weight.to(dtype).abs()
    mean = away.double().mean().to(dtype)
    away = away / mean if mean > 0 else torch.ones_like(away)  # biases that are all zero tell nothing
    if kind == "shuffled_magnitude":
        order = torch.randperm(away.numel(), generator=generator)
        away = away.flatten()[order].view_as(away)
    return threshold + away


def keep_always(scores: Tensor, name: str, weight: Tensor, *, maskable: float, by: str, seed: int) -> None:
    """Give all but a share `maskable` of the weights a score of +infinity, in place; whole, on the CPU.

    Args:
        by: `random`, or `magnitude`: the largest weights may be pruned (appendix F of Warmerdam et al. 2024).
    """
    num_kept = weight.numel() - round(maskable * weight.numel())
    if by == "magnitude":
        order = weight.detach().cpu().flatten().abs().argsort(stable=True)
    else:
        order = torch.randperm(weight.numel(), generator=named_generator(seed, f"maskable/{name}"))
    scores.view(-1)[order[:num_kept]] = torch.inf
