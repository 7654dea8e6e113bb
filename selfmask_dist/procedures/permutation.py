"""Permutations of a network's units that leave its function as it is, over tensors by name.

A group is a set of units that several tensors index: outputs of one layer, inputs of the next, and the
normalisation between them. Permuting all of them alike changes nothing. Knows no architecture (see
`permutation_specs`) and no data.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Axis:
    """Where a tensor indexes a group: dimension `dim` is (before, units, after), as 3 x heads x width."""

    tensor: str
    dim: int
    before: int = 1
    after: int = 1


@dataclass(frozen=True)
class Probe:
    """Where a group's activations can be seen: into or out of a module, units as in `Axis`."""

    module: str
    dim: int
    is_input: bool = False
    after: int = 1


@dataclass(frozen=True)
class Group:
    """Units that are permuted together."""

    name: str
    size: int
    axes: tuple[Axis, ...]
    probe: Probe


Spec = tuple[Group, ...]
Permutations = dict[str, Tensor]
"""{group: int64 (size,)}: unit i of the permuted network is unit perm[i] of the network as it was."""


def identity(spec: Spec) -> Permutations:
    return {group.name: torch.arange(group.size) for group in spec}


def random(spec: Spec, *, seed: int) -> Permutations:
    generator = torch.Generator().manual_seed(seed)
    return {group.name: torch.randperm(group.size, generator=generator) for group in spec}


def inverse(permutations: Permutations) -> Permutations:
    return {name: permutation.argsort() for name, permutation in permutations.items()}


def apply(
    state: Mapping[str, Tensor], spec: Spec, permutations: Permutations, *, leave_out: str | None = None
) -> dict[str, Tensor]:
    """The state of the permuted network: the same function.

    Args:
        leave_out: a group that stays as it is.

    Raises:
        ValueError: the state lacks a tensor of the spec, sizes differ, or what is given permutes nothing.
    """
    permuted = dict(state)
    for group in spec:
        if group.name == leave_out:
            continue
        permutation = permutations[group.name]
        if not torch.equal(permutation.sort().values, torch.arange(group.size)):
            raise ValueError(f"{group.name} is no permutation of {group.size} units")
        for axis in group.axes:
            parts = unfold(permuted, group, axis)
            permuted[axis.tensor] = parts.index_select(axis.dim + 1, permutation).reshape(
                permuted[axis.tensor].shape
            )
    return permuted


def rows(state: Mapping[str, Tensor], group: Group, axis: Axis) -> Tensor:
    """A tensor's entries by unit of a group: (units, rest)."""
    return unfold(state, group, axis).movedim(axis.dim + 1, 0).reshape(group.size, -1)


def unfold(state: Mapping[str, Tensor], group: Group, axis: Axis) -> Tensor:
    """A tensor with the units of a group as dimension `axis.dim + 1`."""
    if axis.tensor not in state:
        raise ValueError(f"the network has no {axis.tensor}, which {group.name} permutes")
    tensor = state[axis.tensor]
    expected = axis.before * group.size * axis.after
    if tensor.shape[axis.dim] != expected:
        raise ValueError(
            f"{axis.tensor} has {tensor.shape[axis.dim]} entries along {axis.dim}, and {group.name} needs "
            f"{expected}"
        )
    return tensor.unflatten(axis.dim, (axis.before, group.size, axis.after))
