"""What a mask's kind means: theta out of its parts, and its parts out of theta.

    threshold    theta = a W M            frozen_sign   theta = s M sign(W)
    sign         theta = +-s              ternary       theta in {p, 0, -n}
    values       theta = M ? V : 0        graft         theta = M ? V : W
    delta        theta = W +- s

M, W, s, p, n and V: bits, frozen weights, scales (a set for each part of a tensor along its first dimension)
and trained values. Parts are taken from a theta as it was trained and give it back bit for bit, or refuse;
those of a delta are rounded from a fine-tuned network (`tools.deltas`). Knows nothing of files.
"""

from typing import Any, get_args

import torch
from torch import Tensor

from selfmask_dist.maskfile.mask import Kind, Mask, MaskFileError
from selfmask_dist.masking import core

KINDS: tuple[Kind, ...] = get_args(Kind)
NUM_SCALES: dict[Kind, int] = {"frozen_sign": 1, "sign": 1, "ternary": 2, "delta": 1}  # of each part
WITH_SIGNS = ("sign", "ternary", "delta")
KEEPS_ALL = ("sign", "delta")  # whose bits are all ones
WITH_VALUES = ("values", "graft")


def as_kind(name: str) -> Kind:
    """Return a kind by its name.

    Raises:
        MaskFileError: there is none of that name.
    """
    for kind in KINDS:
        if kind == name:
            return kind
    raise MaskFileError(f"there is no kind of mask {name!r}; a family's form is one of {', '.join(KINDS)}")


def materialize(mask: Mask, name: str, weight: Tensor) -> Tensor:
    """Return theta of one parameter, in a new tensor of the frozen weight's shape, dtype and device."""
    bits = mask.bits[name].to(weight.device)
    if mask.kind in WITH_VALUES:
        theta = weight.clone() if mask.kind == "graft" else torch.zeros_like(weight)
        theta[bits] = mask.values[name].to(weight.device, weight.dtype)
        return theta
    num_parts = mask.num_segments.get(name, 1)
    pieces = zip(weight.chunk(num_parts), bits.chunk(num_parts), strict=True)
    if mask.kind == "threshold":
        return torch.cat([core.materialize(piece, kept, scaled=mask.scaled) for piece, kept in pieces])
    scales = mask.scales[name].to(weight.device, weight.dtype)
    zero = weight.new_zeros(())
    if mask.kind == "frozen_sign":
        return torch.cat(
            [(piece.sign() * s).where(kept, zero) for (piece, kept), s in zip(pieces, scales, strict=True)]
        )
    signs = mask.signs[name].to(weight.device).chunk(num_parts)
    if mask.kind == "delta":
        return torch.cat(
            [
                piece + torch.where(negative, -s[0], s[0])
                for (piece, _), negative, s in zip(pieces, signs, scales, strict=True)
            ]
        )
    return torch.cat(
        [
            torch.where(kept, torch.where(negative, -s[-1], s[0]), zero)
            for (_, kept), negative, s in zip(pieces, signs, scales, strict=True)
        ]
    )


def take_apart(
    kind: Kind, theta: Tensor, bits: Tensor, weight: Tensor, *, num_parts: int = 1
) -> dict[str, Tensor]:
    """Return the parts of one parameter's theta: `signs`, `scales`, `values`, those that `kind` has.

    Args:
        theta, bits: as they were trained, whole; bits are ones for `sign`.
        weight: the frozen W, which `frozen_sign` and `graft` are put on again.

    Raises:
        MaskFileError: theta is not of that kind: its parts would give another.
    """
    if kind == "delta":
        raise MaskFileError(
            "a mask of kind delta is rounded from the difference of two networks (tools.deltas), and not "
            "taken from a theta"
        )
    parts: dict[str, Tensor] = {}
    pieces = theta.chunk(num_parts) if theta.ndim else (theta,)
    if kind in WITH_SIGNS:
        parts["signs"] = theta.signbit() & bits  # a scale may be 0, and -0 is not below 0
    if kind == "ternary":
        parts["scales"] = torch.stack(
            [torch.stack([_largest(piece), _largest(-piece)]) for piece in pieces]
        ).double()
    elif kind in NUM_SCALES:
        parts["scales"] = torch.stack([_largest(piece.abs()) for piece in pieces])[:, None].double()
    if kind in WITH_VALUES:
        values = theta[bits]
        parts["values"] = values.float() if values.dtype == torch.bfloat16 else values
    named: dict[str, Any] = {key: {"": part} for key, part in parts.items()}
    mask = Mask({"": bits}, "", kind=kind, num_segments={"": num_parts}, **named)
    if not torch.equal(materialize(mask, "", weight), theta):
        raise MaskFileError(
            f"theta is not what a mask of kind {kind} can hold; it was changed after its last step"
        )
    return parts


def _largest(values: Tensor) -> Tensor:
    """Return the largest value, 0-d, 0 where there is none above."""
    return values.amax().clamp(min=0) if values.numel() else values.new_zeros(())


# ---- blocks


def grid_shape(shape: list[int], block: tuple[int, int]) -> tuple[int, int]:
    """Return how many blocks lie along the rows and the columns of a tensor.

    Dimensions after the first are columns.

    Raises:
        ValueError: a block is empty, or larger than the tensor.
    """
    rows, columns = _flat_shape(shape)
    for size, most in zip(block, (rows, columns), strict=True):
        if type(size) is not int or not 1 <= size <= max(most, 1):
            raise ValueError(f"blocks of {str(list(block))[:80]} do not fit shape {str(shape)[:80]}")
    return -(-rows // block[0]), -(-columns // block[1])


def to_grid(bits: Tensor, block: tuple[int, int], name: str = "") -> Tensor:
    """Return one bit for each block, in a 2-D tensor.

    Raises:
        MaskFileError: bits differ within a block.
    """
    flat = bits.reshape(_flat_shape(list(bits.shape)))
    grid_shape(list(bits.shape), block)
    grid = flat[:: block[0], :: block[1]]
    if not torch.equal(from_grid(grid, list(bits.shape), block), bits):
        raise MaskFileError(f"{name}: bits differ within blocks of {block[0]} x {block[1]}")
    return grid


def from_grid(grid: Tensor, shape: list[int], block: tuple[int, int]) -> Tensor:
    """Return the bits of `shape` that `to_grid` made `grid` of."""
    rows, columns = _flat_shape(shape)
    wide = grid[torch.arange(rows) // block[0]]
    return wide[:, torch.arange(columns) // block[1]].reshape(shape)


def _flat_shape(shape: list[int]) -> tuple[int, int]:
    rows = shape[0] if shape else 1
    columns = 1
    for size in shape[1:]:
        columns *= size
    return rows, columns
