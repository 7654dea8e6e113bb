"""What masks look like while they train: active share, flips and mass near the threshold, per parameter.

    active   = sum M / N
    flips    = share of mask bits that differ between two moments
    near     = share of scores with |S - mu| <= band (of families that rank: from the last one kept)

Knows nothing of files or loggers; every function costs one device sync, and is a collective under `shards`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from selfmask_dist.masking.attach import Masks
from selfmask_dist.masking.families import Family
from selfmask_dist.masking.segment import Segment


@dataclass(frozen=True)
class MaskStatistics:
    """Shares between 0 and 1; `active` per parameter and over all, the others over all masked weights."""

    active: float
    active_by_parameter: dict[str, float]
    flips: float | None
    near_threshold: float
    num_nonfinite: int
    empty: tuple[str, ...]


@torch.no_grad()
def measure(masks: Masks, *, before: dict[str, Tensor] | None = None, band: float = 0.1) -> MaskStatistics:
    """Measure masks as they stand.

    Args:
        before: `masks.mask_pieces()` of an earlier moment, for the flips.
        band: half-width around the threshold, in units of a score (which starts at 1 by default).
    """
    now = masks.mask_pieces()
    sizes = [entry.theta.numel() for entry in masks.entries]
    scores = [entry.piece(entry.scores) for entry in masks.entries]
    near = [_near(entry.segments(), masks.family, band) for entry in masks.entries]
    flips = [(now[name] ^ before[name]).sum() for name in now] if before is not None else []
    nonfinite = torch.stack([_nonfinite(piece, masks.family) for piece in scores]).sum()
    counts = torch.stack([nonfinite, *(mask.sum() for mask in now.values()), *near, *flips])
    totals = masks.shards.sum(counts).tolist()  # one sync
    num, total = len(sizes), sum(sizes)
    num_nonfinite, *totals = totals
    kept = totals[:num]
    return MaskStatistics(
        active=sum(kept) / total,
        active_by_parameter={name: k / n for name, k, n in zip(now, kept, sizes, strict=True)},
        flips=sum(totals[2 * num :]) / total if before is not None else None,
        near_threshold=sum(totals[num : 2 * num]) / total,
        num_nonfinite=num_nonfinite,
        empty=tuple(name for name, k in zip(now, kept, strict=True) if k == 0),
    )


def _near(segments: Sequence[Segment], family: Family, band: float) -> Tensor:
    """How many of a piece's weights are near to being switched; 0 where a family has no such distance."""
    distances = [family.distance(segment) for segment in segments]
    near = [(distance.abs() <= band).sum() for distance in distances if distance is not None]
    return torch.stack(near).sum() if near else segments[0].scores.new_zeros((), dtype=torch.int64)


def _nonfinite(piece: Tensor, family: Family) -> Tensor:
    bad = ~piece.isfinite()
    if family.options.maskable < 1:
        bad &= ~piece.isposinf()  # what is always kept
    return bad.sum()
