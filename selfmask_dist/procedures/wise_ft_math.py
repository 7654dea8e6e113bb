"""WiSE-FT: the straight line in weight space between a frozen model and what it was adapted to.

    theta(alpha) = (1 - alpha) theta_0 + alpha theta_1        theta(0) = theta_0,  theta(1) = theta_1 exactly

Some alpha in between is often better under a shift than both ends, and as good on the new data (Wortsman et
al., "Robust fine-tuning of zero-shot models", CVPR 2022, arXiv 2109.01903, eq. 1). The same line between the
scores of two masks is `selfmask_dist.procedures.interpolation`. Pure functions on state dicts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from selfmask_dist.backbones.weights import interpolate, write

ALPHAS = tuple(step / 10 for step in range(11))


@dataclass(frozen=True)
class Point:
    """What was measured at one alpha."""

    alpha: float
    values: dict[str, float]


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
