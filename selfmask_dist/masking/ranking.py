"""The k largest of a tensor, exactly, wherever its pieces lie: k and no more, ties by index.

A piece learns only where the cut runs through it: everything at or above `value` is kept, but for the last
`dropped` of those equal to it. A process that holds whole tensors leaves the selection to a library. Over
ranks it is a radix selection: the bits of a float, put in order, are read byte by byte from the top, and a
histogram of 256 counts for each tensor is summed over ranks, for all tensors together (four small
all-reduces for float32, one more where a tie is cut).

Knows nothing of scores or masks, and of other processes only what `Shards` says.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from selfmask_dist.masking.pieces import Cut, Shards

_BINS = 256
_BYTE = 8


def select(
    pieces: Sequence[Tensor], counts: Sequence[int], groups: Sequence[int], shards: Shards
) -> list[Cut]:
    """Return the cut through each piece. Collective where tensors are in pieces: every rank must call.

    Args:
        pieces: what this process holds of each tensor; pieces are consecutive elements in the order of ranks.
        counts: k of each group, from 1 to the number of its elements.
        groups: the group of each piece, from 0 in ascending order; a group is ranked as one tensor.
    """
    assert list(groups) == sorted(groups), groups
    if not pieces:
        return []
    if shards.is_whole:
        return _select_whole(pieces, counts, groups)
    return _select_over_ranks(pieces, counts, groups, shards)


def _select_whole(pieces: Sequence[Tensor], counts: Sequence[int], groups: Sequence[int]) -> list[Cut]:
    values, kept = [], []
    for group, count in enumerate(counts):
        flat = [p.reshape(-1) for p, g in zip(pieces, groups, strict=True) if g == group]
        whole = flat[0] if len(flat) == 1 else torch.cat(flat)
        values.append(_kth_largest(whole, count))
        kept.append(torch.count_nonzero(whole >= values[-1]))
    surplus = [n - count for n, count in zip(torch.stack(kept).tolist(), counts, strict=True)]  # one sync
    cuts = []
    for piece, group in reversed(list(zip(pieces, groups, strict=True))):  # the last ties go first
        ties = int((piece == values[group]).sum()) if surplus[group] else 0
        dropped = min(surplus[group], ties)
        surplus[group] -= dropped
        cuts.append(Cut(values[group], dropped))
    return cuts[::-1]


def _kth_largest(flat: Tensor, count: int) -> Tensor:
    """Return the `count`-th largest element, 0-d."""
    place = len(flat) - count
    if flat.device.type == "cpu":  # numpy partitions with vector instructions, in half the time of kthvalue
        return torch.from_numpy(np.partition(flat.numpy(), place)[place : place + 1])[0]
    return flat.sort().values[place]  # kthvalue would keep one multiprocessor busy with all of a long tensor


def _select_over_ranks(
    pieces: Sequence[Tensor], counts: Sequence[int], groups: Sequence[int], shards: Shards
) -> list[Cut]:
    keys = [_ordered(piece) for piece in pieces]
    num_bits = keys[0].element_size() * _BYTE
    missing = torch.tensor(counts)  # of each group, still to be found among its candidates
    prefix = torch.zeros(len(counts), dtype=torch.int64)
    for shift in range(num_bits - _BYTE, -1, -_BYTE):
        digits = [_digit(key, shift, is_top=shift == num_bits - _BYTE) for key in keys]
        histogram = _histogram(digits, groups, len(counts), shards)
        at_or_above = histogram.flip(1).cumsum(1).flip(1)
        # the largest digit with enough candidates at or above it
        chosen = (at_or_above >= missing[:, None]).sum(1) - 1
        same = histogram.gather(1, chosen[:, None])[:, 0]
        missing -= at_or_above.gather(1, chosen[:, None])[:, 0] - same
        is_negative_top = shift == num_bits - _BYTE
        prefix |= (chosen - _BINS // 2 if is_negative_top else chosen) << shift
        keys = [key[d == chosen[g]] for key, d, g in zip(keys, digits, groups, strict=True)]
    dropped = _dropped([len(key) for key in keys], missing, same, groups, shards)
    values = _floats(prefix, pieces[0].dtype).to(pieces[0].device).unbind()
    return [Cut(values[group], number) for group, number in zip(groups, dropped, strict=True)]


def _ordered(piece: Tensor) -> Tensor:
    """Return flat integers in the order of the floats."""
    flat = piece.reshape(-1) + 0.0  # -0 becomes 0, to which it is equal
    integers = flat.view(torch.int64 if flat.dtype == torch.float64 else torch.int32)
    return _flip_negatives(integers)


def _flip_negatives(integers: Tensor) -> Tensor:
    """Turn all bits but the sign of negative floats, which count downwards. It is its own inverse."""
    return torch.where(integers < 0, integers ^ torch.iinfo(integers.dtype).max, integers)


def _floats(keys: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the inverse of `_ordered`, from 64-bit keys."""
    integers = keys if dtype == torch.float64 else keys.to(torch.int32)
    return _flip_negatives(integers).view(dtype)


def _digit(keys: Tensor, shift: int, *, is_top: bool) -> Tensor:
    """Return one byte of each key, 0 to 255; the top one has the sign."""
    digit = keys >> shift
    return digit + _BINS // 2 if is_top else digit & (_BINS - 1)


def _histogram(digits: Sequence[Tensor], groups: Sequence[int], num_groups: int, shards: Shards) -> Tensor:
    """Return counts by (group, digit) over all ranks, on the CPU."""
    histogram = torch.zeros(num_groups, _BINS, dtype=torch.int64, device=digits[0].device)
    for digit, group in zip(digits, groups, strict=True):
        histogram[group] += digit.bincount(minlength=_BINS)
    return shards.sum(histogram).cpu()


def _dropped(
    ties: Sequence[int], missing: Tensor, total: Tensor, groups: Sequence[int], shards: Shards
) -> list[int]:
    """Return how many of each piece's last ties are not kept.

    Args:
        ties: elements of each piece that equal the cut.
        missing: how many of a group's ties are kept, of the `total` that it has.
    """
    if torch.equal(missing, total):
        return [0] * len(ties)
    table = torch.zeros(len(ties), shards.num_pieces, dtype=torch.int64)
    table[:, shards.piece_index] = torch.tensor(ties)
    table = shards.sum(table)
    dropped = []
    before = [0] * len(missing)  # ties of a group in earlier tensors
    for row, group in zip(table, groups, strict=True):
        mine = int(row[shards.piece_index])
        first = before[group] + int(row[: shards.piece_index].sum())
        dropped.append(mine - min(max(int(missing[group]) - first, 0), mine))
        before[group] += int(row.sum())
    return dropped
