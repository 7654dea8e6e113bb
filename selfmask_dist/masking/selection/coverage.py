"""How much of a model's matrices a choice of parameters is, and what it leaves out."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from selfmask_dist.common.tensor_names import plain
from selfmask_dist.common.text import some
from selfmask_dist.masking.selection.choosing import ENOUGH, PRESET_NAMES, as_tuple, select
from selfmask_dist.masking.selection.layers import find_parts


@dataclass(frozen=True)
class Coverage:
    """How much of a model's matrices carries a mask; matrices are the weights of linear layers,
    convolutions and attention projections, without the classifier.

    num_tensors, num_weights: under a mask, biases too.
    masked, total: weights of matrices, under a mask and in all.
    left_out: names of the other matrices, the largest first.
    """

    num_tensors: int
    num_weights: int
    masked: int
    total: int
    left_out: tuple[str, ...]

    @property
    def share(self) -> float:
        """Return the share of the matrices' weights that is masked, 0 to 1; 1 where there are none."""
        return self.masked / self.total if self.total else 1.0

    def __str__(self) -> str:
        return f"{self.num_tensors} tensors, {self.num_weights:,} weights, {self.describe_matrices()}"

    def describe_matrices(self) -> str:
        """Return the share of the matrices, and what is left out, as a part of a line; below 95 % in full."""
        text = f"{self.share:.1%} of the matrices' weights masked"
        limit = 3 if self.share >= ENOUGH else 12
        return f"{text}; left out {some(self.left_out, limit)}" if self.left_out else text


def measure_coverage(model: nn.Module, names: Sequence[str], *, below: str = "") -> Coverage:
    """Return how much of the model's matrices the parameters `names` are.

    Args:
        below: count matrices whose plain names start with this, such as `visual.`.
    """
    chosen, parts, parameters = set(names), find_parts(model), dict(model.named_parameters())
    layers = (*parts.stem, *parts.body, *parts.pool)
    sizes = {
        name: parameters[name].numel()
        for layer in layers
        for name in layer.matrices
        if plain(name).startswith(below)
    }
    masked = sum(size for name, size in sizes.items() if name in chosen)
    left_out = sorted((name for name in sizes if name not in chosen), key=lambda name: -sizes[name])
    num_weights = sum(parameters[name].numel() for name in chosen if name in parameters)
    return Coverage(len(chosen), num_weights, masked, sum(sizes.values()), tuple(left_out))


def uncovered(model: nn.Module, include: str | Sequence[str]) -> Coverage | None:
    """Return what presets cover of a model, where that is less than half of its matrices; else None.

    Patterns of one's own, and parts such as `stem`, are a choice and are never judged.
    """
    patterns = as_tuple(include)
    if not all(pattern in PRESET_NAMES for pattern in patterns) or set(patterns) <= {"stem", "pool"}:
        return None
    below = "visual." if all(pattern == "clip_visual" for pattern in patterns) else ""
    found = measure_coverage(model, select(model, include), below=below)
    return found if found.share < 0.5 else None
