"""The nearest neighbours within one rank's part of the bank: what `search` does between exchanges.

    float32:  top k of Q B^T for each block of the bank, merged
    bf16:     top k' > k of bf16(Q) bf16(B)^T, whose exact similarities are then computed; a query for which
              rounding could have hidden a neighbour is searched again in float32

Both give the same neighbours: with e the largest error of a rounded similarity, whatever is not among the k'
has an exact similarity of at most (the smallest of the k' rounded ones) + e; where that is below the k-th
exact one, nothing is missed.
"""

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Precision = Literal["float32", "bf16"]
NO_ID = 2**31 - 1
_BF16_ROUNDING = 2.0**-9  # relative, to nearest; similarities are at most 1
_RERANK_BYTES = 32 * 2**20


@torch.no_grad()
def nearest(
    bank: Tensor, bank_ids: Tensor, queries: Tensor, k: int, *, block: int, precision: Precision
) -> tuple[Tensor, Tensor]:
    """The k nearest of this part, ties by id: similarities (m, k) float32 and ids (m, k) int32; where the
    part has fewer than k rows, the rest is -infinity and `NO_ID`.

    Args:
        bank: (n, dim) of any float type, ids (n,) ascending. queries: (m, dim) float32, at unit length or 0.
        block: rows of the bank multiplied at a time.
    """
    if precision == "bf16" and len(bank) > k:
        return _nearest_by_candidates(bank, bank_ids, queries, k, block)
    sims = queries.new_full((len(queries), k), -torch.inf)
    ids = torch.full((len(queries), k), NO_ID, dtype=torch.int32, device=queries.device)
    for start, similarities in _similarities(bank, queries, block, torch.float32):
        block_sims, columns = top(similarities, k)
        block_ids = bank_ids[start : start + block].int()[columns]
        # both parts are in order and the ids so far are smaller: a stable sort keeps the smaller id first
        sims, order = torch.cat([sims, block_sims], dim=1).sort(dim=1, descending=True, stable=True)
        ids = torch.cat([ids, block_ids], dim=1).gather(1, order)
        sims, ids = sims[:, :k], ids[:, :k]
    return sims.contiguous(), ids.contiguous()


def top(sims: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row in order, equal ones by column: a stable sort at the price of topk."""
    if sims.shape[1] <= k:
        return sims.sort(dim=1, descending=True, stable=True)
    values, columns = sims.topk(k + 1, dim=1)
    is_cut_tied = values[:, k - 1] == values[:, k]  # which of the equal ones topk kept is then undefined
    values, columns = _in_order(values[:, :k], columns[:, :k])
    if is_cut_tied.any():  # device sync, once for each block
        values_tied, columns_tied = sims[is_cut_tied].sort(dim=1, descending=True, stable=True)
        values[is_cut_tied], columns[is_cut_tied] = values_tied[:, :k], columns_tied[:, :k]
    return values, columns


def _in_order(sims: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Largest first, equal ones by place."""
    places, order = places.sort(dim=1)
    sims, order = sims.gather(1, order).sort(dim=1, descending=True, stable=True)
    return sims, places.gather(1, order)


def _similarities(
    bank: Tensor, queries: Tensor, block: int, dtype: torch.dtype
) -> Iterator[tuple[int, Tensor]]:
    """First row and similarities (m, rows) of each block; overwritten by the next."""
    left = queries.to(dtype)
    # one buffer: fresh pages for each block cost a tenth of the product
    buffer = left.new_empty(len(left) * min(block, len(bank)))
    for start in range(0, len(bank), block):
        right = F.normalize(bank[start : start + block].float()).to(dtype)
        out = buffer[: len(left) * len(right)].view(len(left), len(right))
        yield start, torch.mm(left, right.T, out=out)


def _nearest_by_candidates(
    bank: Tensor, bank_ids: Tensor, queries: Tensor, k: int, block: int
) -> tuple[Tensor, Tensor]:
    width = min(num_candidates(k), len(bank))
    rounded = queries.new_empty(len(queries), 0)
    rows = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start, similarities in _similarities(bank, queries, block, torch.bfloat16):
        found, columns = similarities.topk(min(width, similarities.shape[1]), dim=1, sorted=False)
        rounded, rows = torch.cat([rounded, found.float()], dim=1), torch.cat([rows, columns + start], dim=1)
        if rounded.shape[1] > width:
            rounded, order = rounded.topk(width, dim=1, sorted=False)
            rows = rows.gather(1, order)
    sims, rows = _in_order(_exact(bank, queries, rows), rows)
    # ids rise with rows: what was ordered by row is ordered by id
    sims, ids = sims[:, :k].contiguous(), bank_ids[rows[:, :k]].int()
    if width < len(bank):
        unsure = rounded.amin(dim=1) + _rounding_error(bank, queries, block) >= sims[:, -1]
        if unsure.any():  # device sync
            sims[unsure], ids[unsure] = nearest(
                bank, bank_ids, queries[unsure], k, block=block, precision="float32"
            )
    return sims, ids


def num_candidates(k: int) -> int:
    """Neighbours by bf16 among which the k nearest are looked for."""
    return k + max(64, k // 2)


def _exact(bank: Tensor, queries: Tensor, rows: Tensor) -> Tensor:
    """Float32 similarities (m, width) of each query to its own rows of the bank."""
    at_once = max(1, _RERANK_BYTES // (8 * rows.shape[1] * bank.shape[1]))
    # the length is divided out of the product: out of the rows themselves it would cost more than the product
    length = torch.linalg.vector_norm(bank, dim=1, dtype=torch.float32).clamp(min=1e-12)
    parts = [
        (bank[part_rows].float() @ part[:, :, None]).squeeze(2) / length[part_rows]
        for part, part_rows in zip(queries.split(at_once), rows.split(at_once), strict=True)
    ]
    return torch.cat(parts)


def _rounding_error(bank: Tensor, queries: Tensor, block: int) -> Tensor:
    """(m,): how far a bf16 similarity can be from the exact one, for unit vectors q and b:

    |q'b' - qb| <= |q' - q| |b'| + |b' - b|,   and rounding of the result and of float32 sums
    """
    of_bank = max(
        float(_distance_to_bf16(F.normalize(bank[start : start + block].float())).max())
        for start in range(0, len(bank), block)
    )
    of_queries = _distance_to_bf16(queries)
    sums = 2 * bank.shape[1] * 2.0**-24
    return of_queries * (1 + of_bank) + of_bank + _BF16_ROUNDING + sums


def _distance_to_bf16(vectors: Tensor) -> Tensor:
    return (vectors.bfloat16().float() - vectors).norm(dim=1)
