"""Permutations of a network's units that leave its function as it is, over tensors by name.

A group is a set of units that several tensors index: outputs of one layer, inputs of the next, and the
normalisation between them. Permuting all of them alike changes nothing. Knows no architecture (see
`specs`) and no data.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Axis:
    """Where a tensor indexes a group: dimension `dim` is (before, units, after), as 3 x heads x width.

    `start`: the dimension only from there on, and no further than the group reaches; None for all of it.
    """

    tensor: str
    dim: int
    before: int = 1
    after: int = 1
    start: int | None = None


@dataclass(frozen=True)
class Probe:
    """Where a group's activations can be seen: into or out of a module, units as in `Axis`."""

    module: str
    dim: int
    is_input: bool = False
    before: int = 1
    after: int = 1
    start: int | None = None


@dataclass(frozen=True)
class Group:
    """Units that are permuted together.

    With `blocks`, units come in that many blocks of equal size, as the heads of attention: blocks change
    places as wholes, and units within them. Groups with the same `order` have their blocks in one order.
    """

    name: str
    size: int
    axes: tuple[Axis, ...]
    probe: Probe
    blocks: int = 1
    order: str = ""


Spec = tuple[Group, ...]
Permutations = dict[str, Tensor]
"""{group: int64 (size,)}: unit i of the permuted network is unit perm[i] of the network as it was."""


def identity(spec: Spec) -> Permutations:
    """Return the permutations that change nothing."""
    return {group.name: torch.arange(group.size) for group in spec}


def together(spec: Spec) -> list[tuple[Group, ...]]:
    """Return the groups that can only be chosen at once: those with one order of blocks."""
    found: dict[str, list[Group]] = {}
    for group in spec:
        found.setdefault(group.order or group.name, []).append(group)
    return [tuple(groups) for groups in found.values()]


def apply(
    state: Mapping[str, Tensor], spec: Spec, permutations: Permutations, *, leave_out: Collection[str] = ()
) -> dict[str, Tensor]:
    """Return the state of the permuted network, which computes the same function.

    Args:
        leave_out: names of groups that stay as they are.

    Raises:
        ValueError: the state lacks a tensor of the spec, sizes differ, or what is given permutes nothing or
            takes blocks apart.
    """
    permuted = dict(state)
    for groups in together(spec):
        orders = [_block_order(group, permutations[group.name]) for group in groups]
        if any(order != orders[0] for order in orders):
            raise ValueError(f"{', '.join(group.name for group in groups)} put their blocks in other orders")
        for group in groups:
            for axis in group.axes if group.name not in leave_out else ():
                parts = unfold(permuted, group, axis).index_select(axis.dim + 1, permutations[group.name])
                parts = parts.flatten(axis.dim, axis.dim + 2)
                indices = torch.arange(parts.shape[axis.dim]) + (axis.start or 0)
                permuted[axis.tensor] = permuted[axis.tensor].index_copy(axis.dim, indices, parts)
    return permuted


def _block_order(group: Group, permutation: Tensor) -> list[int]:
    if not torch.equal(permutation.sort().values, torch.arange(group.size)):
        raise ValueError(f"{group.name} is no permutation of {group.size} units")
    blocks = permutation.div(group.size // group.blocks, rounding_mode="floor").view(group.blocks, -1)
    if (blocks != blocks[:, :1]).any():
        raise ValueError(f"{group.name} takes its {group.blocks} blocks apart")
    order: list[int] = blocks[:, 0].tolist()
    return order


def rows(state: Mapping[str, Tensor], group: Group, axis: Axis) -> Tensor:
    """Return a tensor's entries by unit of a group: (units, rest)."""
    return unfold(state, group, axis).movedim(axis.dim + 1, 0).reshape(group.size, -1)


def activations(values: Tensor, group: Group) -> Tensor:
    """Return what the group's probe sees, by unit: (units, samples)."""
    dim = group.probe.dim % values.ndim
    return _view(values, group, replace(group.probe, dim=dim)).movedim(dim + 1, 0).reshape(group.size, -1)


def unfold(state: Mapping[str, Tensor], group: Group, axis: Axis) -> Tensor:
    """Return a tensor with the units of a group as dimension `axis.dim + 1`."""
    if axis.tensor not in state:
        raise ValueError(f"the network has no {axis.tensor}, which {group.name} permutes")
    length, there = axis.before * group.size * axis.after, state[axis.tensor].shape[axis.dim]
    if there != length if axis.start is None else there < axis.start + length:
        raise ValueError(
            f"{axis.tensor} has {there} entries along {axis.dim}, and {group.name} needs "
            f"{(axis.start or 0) + length}"
        )
    return _view(state[axis.tensor], group, axis)


def _view(tensor: Tensor, group: Group, place: Axis | Probe) -> Tensor:
    part = tensor.narrow(place.dim, place.start or 0, place.before * group.size * place.after)
    return part.unflatten(place.dim, (place.before, group.size, place.after))
