"""Masks out of masks: what several of one backbone have in common.

All are elementwise on bits. Statistics of normalisation layers and metrics belong to a training and do not
survive: a mask made here has none. Masks that hold signs, scales or trained values beside their bits do not
combine: bits alone would not say what they stand for.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from selfmask_dist.maskfile.mask import Mask, MaskFileError


def intersection(masks: Sequence[Mask]) -> Mask:
    """Return a mask of the weights that every mask keeps."""
    return _combine(masks, lambda votes: votes == len(masks))


def union(masks: Sequence[Mask]) -> Mask:
    """Return a mask of the weights that any mask keeps."""
    return _combine(masks, lambda votes: votes > 0)


def majority(masks: Sequence[Mask]) -> Mask:
    """Return a mask of the weights that at least half of the masks keep."""
    return _combine(masks, lambda votes: 2 * votes >= len(masks))


OPERATIONS: dict[str, Callable[[Sequence[Mask]], Mask]] = {
    "intersection": intersection,
    "union": union,
    "majority": majority,
}


def check_same_backbone(masks: Sequence[Mask]) -> None:
    """Raise MaskFileError unless all masks are of the same weights, and of the same parameters."""
    if not masks:
        raise MaskFileError("there is no mask to combine")
    first = masks[0]
    for place, mask in enumerate(masks[1:], start=2):
        if mask.weights_fingerprint != first.weights_fingerprint or mask.bits.keys() != first.bits.keys():
            raise MaskFileError(
                f"mask {place} is of other weights than mask 1: {len(mask.bits)} parameters with fingerprint "
                f"{mask.weights_fingerprint[:12]}, against {len(first.bits)} with "
                f"{first.weights_fingerprint[:12]}; only masks of one backbone combine"
            )
        if (mask.scaled, mask.num_segments) != (first.scaled, first.num_segments):
            raise MaskFileError(f"mask {place} scales its weights otherwise than mask 1")


def _combine(masks: Sequence[Mask], decide: Callable[[Tensor], Tensor]) -> Mask:
    check_same_backbone(masks)
    for place, mask in enumerate(masks, start=1):
        if mask.kind != "threshold":
            raise MaskFileError(
                f"mask {place} is of kind {mask.kind}, whose weights are more than kept or not; only masks "
                f"of kind threshold combine (merge --how collect puts others side by side)"
            )
    first = masks[0]
    bits = {
        name: decide(torch.stack([mask.bits[name] for mask in masks]).sum(dim=0, dtype=torch.int32))
        for name in first.bits
    }
    is_alike = all(mask.blocks == first.blocks for mask in masks)
    return Mask(
        bits,
        first.weights_fingerprint,
        scaled=first.scaled,
        num_segments=dict(first.num_segments),
        blocks=dict(first.blocks) if is_alike else {},
    )
