"""The nearest neighbours within one rank's part of the bank: what `search` does between exchanges.

    float32:  top k of Q B^T for each block of the bank, merged
    bf16:     top k' > k of bf16(Q) bf16(B)^T, whose exact similarities are then computed; a query for which
              rounding could have hidden a neighbour is searched again in float32

Both give the same neighbours: with e the largest error of a rounded similarity, whatever is not among the k'
has an exact similarity of at most (the smallest of the k' rounded ones) + e; where that is below the k-th
exact one, nothing is missed.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Precision = Literal["float32", "bf16"]
NO_ID = 2**31 - 1
_BF16_ROUNDING = 2.0**-9  # relative, to nearest; similarities are at most 1
_RERANK_BYTES = 32 * 2**20
_QUERIES, _ROWS = 512, 4096  # of a product on a CPU


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
    sims, rows = _scan(bank, queries, k, block, torch.float32)
    sims, rows = _in_order(sims, rows)
    return sims, F.pad(bank_ids.int(), (0, 1), value=NO_ID)[rows]  # -1 is the last one


def _scan(bank: Tensor, queries: Tensor, k: int, block: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The k nearest by products in `dtype`, in no order: similarities (m, k) in it, and rows of the bank,
    -infinity and -1 where it has fewer than k.
    """
    left = queries.to(dtype)
    # on a CPU few queries at a time: their similarities then stay in the cache from product to comparison
    at_once = _QUERIES if queries.device.type == "cpu" else max(len(queries), 1)
    parts = [(part, _Best(part, k)) for part in left.split(at_once)]
    block = min(block, _ROWS) if queries.device.type == "cpu" else block
    # one buffer: fresh pages for each block cost a tenth of the product
    buffer = left.new_empty(at_once * min(block, len(bank)))
    for start in range(0, len(bank), block):
        rows = F.normalize(bank[start : start + block].float()).to(dtype)
        for part, best in parts:
            sims = buffer[: len(part) * len(rows)].view(len(part), len(rows))
            best.add(torch.mm(part, rows.T, out=sims), start)
    found = [best.settle() for _, best in parts]
    return torch.cat([sims for sims, _ in found]), torch.cat([rows for _, rows in found])


class _Best:
    """The k best rows of the bank so far for a few queries, and room for as many that may be better.

    A row enters where it beats the k-th best of the last time that room ran out. So of a bank in random order
    all but about k log(n / k) rows are passed over by one comparison.
    """

    def __init__(self, queries: Tensor, k: int) -> None:
        count, device = len(queries), queries.device
        self._k = k
        self._sims = queries.new_full((count, 2 * k), -torch.inf)
        self._rows = torch.full((count, 2 * k), -1, dtype=torch.int64, device=device)
        self._used = torch.zeros(count, dtype=torch.int64, device=device)
        self._bar = queries.new_full((count, 1), -torch.inf)

    def add(self, sims: Tensor, first: int) -> None:
        """Look at similarities (m, n) to n rows of the bank, of numbers from `first`, which only rises."""
        for _ in range(2 if first else 0):  # at first all are better
            # as good as the k-th best is not better: of equal ones the first stays
            query, column = (sims > self._bar).nonzero(as_tuple=True)  # device sync
            counts = torch.bincount(query, minlength=len(sims))
            if int((self._used + counts).max()) <= self._sims.shape[1]:
                before = counts.cumsum(0) - counts
                place = torch.arange(len(query), device=query.device) + (self._used - before)[query]
                self._sims[query, place] = sims[query, column]
                self._rows[query, place] = column + first
                self._used += counts
                return
            self.settle()
        best, columns = _top(sims, torch.arange(sims.shape[1], device=sims.device).expand_as(sims), self._k)
        self._keep(torch.cat([self._sims, best], dim=1), torch.cat([self._rows, columns + first], dim=1))

    def settle(self) -> tuple[Tensor, Tensor]:
        """Keep the k best alone; returns them, in no order."""
        self._keep(self._sims, self._rows)
        return self._sims[:, : self._k], self._rows[:, : self._k]

    def _keep(self, sims: Tensor, rows: Tensor) -> None:
        sims, rows = _top(sims, rows, self._k)
        self._sims[:, : self._k], self._rows[:, : self._k] = sims, rows
        self._sims[:, self._k :], self._rows[:, self._k :] = -torch.inf, -1
        self._used.fill_(self._k)
        self._bar = sims.amin(dim=1, keepdim=True)


def _top(sims: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of `sims`, in no order, and their numbers in `rows`; of equal ones those of
    the smallest numbers, but for bf16, where equal says little.
    """
    if sims.shape[1] <= k:
        return F.pad(sims, (0, k - sims.shape[1]), value=-torch.inf), F.pad(
            rows, (0, k - rows.shape[1]), value=-1
        )
    values, columns = sims.topk(k + 1, dim=1)
    found = values[:, :k], rows.gather(1, columns[:, :k])
    if sims.dtype == torch.bfloat16:
        return found
    is_tied = (values[:, k - 1] == values[:, k]) & values[:, k].isfinite()  # topk may have kept either
    if is_tied.any():  # device sync
        cut, tied, numbers = values[is_tied, k - 1 : k], sims[is_tied], rows[is_tied]
        # all above the cut, then those at it by number
        rank = torch.where(tied > cut, -1, torch.where(tied == cut, numbers, NO_ID))
        columns = rank.topk(k, dim=1, largest=False).indices
        found[0][is_tied], found[1][is_tied] = tied.gather(1, columns), numbers.gather(1, columns)
    return found


def _in_order(sims: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Largest first, equal ones by their numbers in `rows` (which rise with ids)."""
    sims, order = sims.sort(dim=1, descending=True)
    rows = rows.gather(1, order)
    is_tied = (sims[:, 1:] == sims[:, :-1]).any(dim=1)
    if is_tied.any():  # device sync; a sort of integers costs more than one of floats
        by_row, order = rows[is_tied].sort(dim=1)
        sims[is_tied], best = sims[is_tied].gather(1, order).sort(dim=1, descending=True, stable=True)
        rows[is_tied] = by_row.gather(1, best)
    return sims, rows


def _nearest_by_candidates(
    bank: Tensor, bank_ids: Tensor, queries: Tensor, k: int, block: int
) -> tuple[Tensor, Tensor]:
    width = min(num_candidates(k), len(bank))
    rounded, rows = _scan(bank, queries, width, block, torch.bfloat16)
    sims, rows = _in_order(_exact(bank, queries, rows), rows)
    sims, ids = sims[:, :k].contiguous(), bank_ids.int()[rows[:, :k]]
    if width < len(bank):
        smallest = rounded.amin(dim=1).float()
        unsure = smallest + _rounding_error(bank, queries, block) >= sims[:, -1]
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
