"""WiSE-FT: the straight line in weight space between a frozen model and what it was adapted to.

    theta(alpha) = (1 - alpha) theta_0 + alpha theta_1        theta(0) = theta_0,  theta(1) = theta_1 exactly

Some alpha in between is often better under a shift than both ends, and as good on the new data (Wortsman et
al., "Robust fine-tuning of zero-shot models", CVPR 2022, arXiv 2109.01903, eq. 1). The same line between the
scores of two masks is `selfmask_dist.procedures.interpolation`. Pure functions on state dicts.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

ALPHAS = tuple(step / 10 for step in range(11))


@dataclass(frozen=True)
class Point:
    """What was measured at one alpha."""

    alpha: float
    values: dict[str, float]


def interpolate(first: Mapping[str, Tensor], second: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """theta(alpha) in new tensors; whole numbers (counters of batches) are those of the nearer end.

    Args:
        alpha: 0 to 1; beyond lies extrapolation, which is allowed.

    Raises:
        ValueError: names, shapes or kinds of numbers differ, or alpha is not finite.
    """
    check_same(first, second)
    if not math.isfinite(alpha):
        raise ValueError(f"alpha must be a finite number, got {alpha}")
    if alpha in (0, 1):  # to the bit, infinities and all
        return {name: tensor.clone() for name, tensor in (second if alpha else first).items()}
    return {
        name: _between(tensor, second[name], alpha)
        if tensor.is_floating_point()
        else (second[name] if alpha >= 0.5 else tensor).clone()
        for name, tensor in first.items()
    }


def curve(
    model: nn.Module,
    first: Mapping[str, Tensor],
    second: Mapping[str, Tensor],
    measure_fn: Callable[[nn.Module], Mapping[str, float]],
    *,
    alphas: Sequence[float] = ALPHAS,
) -> list[Point]:
    """`measure_fn(model)` all along the line. The model's own state is put back at the end.

    Args:
        first, second: tensors of `model` by name: all of its state, or the part that differs.

    Raises:
        ValueError: a name that the model does not have, or as `interpolate`.
    """
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    points = []
    try:
        for alpha in alphas:
            write(model, interpolate(first, second, alpha))
            points.append(Point(alpha, dict(measure_fn(model))))
    finally:
        write(model, before)
    return points


def best(points: Sequence[Point], key: str) -> Point:
    """The point with the largest value of `key`; of equal ones the one nearest to alpha = 0."""
    if not points or any(key not in point.values for point in points):
        raise ValueError(f"not every point of the curve has a value {key!r}")
    return max(points, key=lambda point: (point.values[key], -point.alpha))


@torch.no_grad()
def write(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into the model's own, by name."""
    own = model.state_dict()
    if unknown := sorted(set(tensors) - set(own)):
        raise ValueError(f"the model has no {unknown[0]} (and {len(unknown) - 1} more)")
    for name, tensor in tensors.items():
        own[name].copy_(tensor)


def check_same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    """Raise a ValueError where names or shapes of two states differ."""
    if names := sorted(set(first) ^ set(second)):
        raise ValueError(f"two models with other parameters cannot be mixed: only one has {names[0]}")
    for name, tensor in first.items():
        if tensor.shape != second[name].shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} in one model and {tuple(second[name].shape)} in the "
                f"other; only models of one architecture can be mixed"
            )


def _between(first: Tensor, second: Tensor, alpha: float) -> Tensor:
    return (first.double() * (1 - alpha) + second.double() * alpha).to(first.dtype)
