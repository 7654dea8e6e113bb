"""The nearest neighbours within one rank's part of the bank: what `search` does between exchanges.

    products Q B^T in float32 or bf16, a block of the bank at a time
    where one is at least its query's bar, less the product's error, the similarity is computed and kept
    the k nearest of those, if the last of them reaches the bar

A bar is guessed from the blocks seen so far, so low that it nearly always holds; a query for which it does
not is searched again without guesses. So most of the bank is passed over by one comparison, and nothing
depends on the guess. On a CPU a similarity is a sum in one order, whatever the product, the block and the
number of ranks: neighbours are the same everywhere, and equal rows are equally near.

A neighbour is one integer, so that one sort decides everything, ties included, on one rank and over ranks:

    key = ~bits(similarity) * 2^32 + id      bits: of a float32, turned so that they rise with it

Sorted, such keys are neighbours from the nearest, and of equal similarities by id.
"""

import contextlib
import math
import warnings
from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Precision = Literal["float32", "bf16"]
_QUERIES, _ROWS = 1024, 1024  # of a product on a CPU
_GOLDEN = (math.sqrt(5) - 1) / 2
_SPARE = 32  # neighbours for which there is room beyond what k asks
_AT_ONCE = 2**14  # similarities computed one by one, on a GPU
NO_ID = 2**31 - 1
_MAGNITUDE = 2**31 - 1  # all bits of a float32 but its sign
_ID = 2**32 - 1


def encode(sims: Tensor, ids: Tensor) -> Tensor:
    """Return keys, int64, of similarities (float32) and ids from 0 to `NO_ID`."""
    bits = (sims + 0.0).view(torch.int32)  # -0 and 0 are equal
    rising = bits ^ ((bits >> 31) & _MAGNITUDE)  # the larger a negative number's bits, the smaller it is
    return ((~rising).long() << 32) | ids


def decode(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return the similarities (float32) and ids (int64) of keys."""
    rising = ~(keys >> 32).int()
    bits = rising ^ ((rising >> 31) & _MAGNITUDE)
    return bits.view(torch.float32), keys & _ID


def sort_rows(keys: Tensor) -> None:
    """Sort each row of keys (m, n), in place: the nearest first."""
    if keys.device.type == "cpu":
        keys.numpy().sort(axis=1)  # vectorised: a tenth of torch's time
    else:
        keys.copy_(keys.sort(dim=1).values)


NO_KEY = int(encode(torch.tensor([-torch.inf]), torch.tensor([NO_ID])))  # farther than every neighbour


@torch.no_grad()
def nearest(
    bank: Tensor, bank_ids: Tensor, queries: Tensor, k: int, *, block: int, precision: Precision
) -> Tensor:
    """Return the keys (m, k) of the k nearest rows of this part, nearest first; `NO_KEY` where it has fewer.

    Args:
        bank: (n, dim) of any float type, ids (n,) ascending. queries: (m, dim) float32, at unit length or 0.
        block: rows of the bank multiplied at a time.
    """
    if queries.device.type == "cpu":
        block = min(block, _ROWS)
    keys, is_open = _scan(bank, bank_ids, queries, k, block, precision, guesses=True)
    if is_open.any():  # device sync
        again, _ = _scan(bank, bank_ids, queries[is_open], k, block, precision, guesses=False)
        keys[is_open] = again
    return keys


def _scan(
    bank: Tensor,
    bank_ids: Tensor,
    queries: Tensor,
    k: int,
    block: int,
    precision: Precision,
    *,
    guesses: bool,
) -> tuple[Tensor, Tensor]:
    """Return the keys (m, k) of the k nearest of what was kept, and for which queries (m,) more may be
    missing.

    Args:
        guesses: whether a bar may be higher than the k-th nearest so far.
    """
    # on a CPU few queries at a time: their products then stay in the cache until they are compared
    at_once = _QUERIES if queries.device.type == "cpu" else max(len(queries), 1)
    parts = [_Best(part, k) for part in queries.split(at_once)]
    is_rough = precision == "bf16"
    rounded = [_Rounded(best.queries) if is_rough else None for best in parts]
    # one buffer: fresh pages for each block cost a tenth of the product
    buffer = queries.new_empty(at_once * min(block, len(bank)))
    with _float32_sums():
        for turn, start in enumerate(range(0, len(bank), block), start=1):
            stop = min(start + block, len(bank))
            numbers = _spread(start, stop, len(bank), bank.device)
            rows, ids = F.normalize(bank.index_select(0, numbers).float()), bank_ids[numbers]
            rank = _guess(k, stop / len(bank)) if guesses else k
            rounded_rows = _Rounded(rows) if is_rough and start else None
            for best, rounded_queries in zip(parts, rounded, strict=True):
                if rounded_queries is not None and rounded_rows is not None:
                    products, errors = _rounded_products(rounded_queries, rounded_rows, buffer)
                    if best.see(products, errors, rows, ids):
                        continue
                products, error = _multiply(best.queries, rows, buffer), _error_of_sums(rows)
                if not start and rank <= len(rows):
                    best.bar = products.topk(rank).values[:, -1:] - error
                best.see_all(products, error, rows, ids)
            if turn & (turn - 1) == 0:  # 1, 2, 4, 8, ... blocks have been seen
                for best in parts:
                    best.raise_bar(rank)
    keys = torch.cat([best.settle() for best in parts])
    return keys, decode(keys[:, -1])[0] < torch.cat([best.bar for best in parts]).squeeze(1)


def _guess(k: int, share: float) -> int:
    """Return a rank among that share of the bank, so low that k rows of the whole bank nearly always reach
    its similarity: of the k nearest, k * share are expected in the share, and hardly ever five deviations
    more.
    """
    return min(k, math.ceil(k * share + 5 * math.sqrt(k * share * (1 - share)) + 2))


def _spread(start: int, stop: int, length: int, device: torch.device) -> Tensor:
    """Return the numbers of the rows in a block; all blocks together have each row once.

    A step by the golden section spreads a block over the bank, so that it is a fair sample however the bank
    is sorted.
    """
    step = max(1, round(length * _GOLDEN))
    while math.gcd(step, length) > 1:
        step += 1
    return torch.arange(start, stop, device=device) * step % length


def _multiply(queries: Tensor, rows: Tensor, buffer: Tensor) -> Tensor:
    out = buffer.view(queries.dtype)[: len(queries) * len(rows)]
    return torch.mm(queries, rows.T, out=out.view(len(queries), len(rows)))


def _error_of_sums(rows: Tensor) -> float:
    """Return how far apart two float32 sums of the same products can be, for unit vectors."""
    return 2.1 * rows.shape[1] * 2.0**-24


class _Rounded:
    """Unit vectors in bf16, and how far each is from what it was (n, 1)."""

    def __init__(self, vectors: Tensor) -> None:
        self.vectors = vectors.bfloat16()
        self.error = self.vectors.float().sub_(vectors).norm(dim=1, keepdim=True)


def _rounded_products(queries: _Rounded, rows: _Rounded, buffer: Tensor) -> tuple[Tensor, Tensor]:
    """bf16 products (m, n), and how far each query's can be from their similarities (m, 1).

        |q'b' - qb| <= |q' - q| |b'| + |b' - b|,  and the sums' error

    They are rounded to bf16 in the end, which a bar less its error is as well: rounding keeps the order.
    """
    of_rows = rows.error.max()
    error = queries.error * (1 + of_rows) + of_rows + _error_of_sums(rows.vectors)
    return _multiply(queries.vectors, rows.vectors, buffer), error


@contextlib.contextmanager
def _float32_sums() -> Iterator[None]:
    """bf16 products on a GPU with sums in float32 throughout, as the bound on their error has them."""
    settings = torch.backends.cuda.matmul
    before = settings.allow_bf16_reduced_precision_reduction
    settings.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        settings.allow_bf16_reduced_precision_reduction = before


class _Best:
    """The neighbours so far of a few queries: what reached their bar (m, 1), and there is room for; else the
    k nearest, whose last is the new bar.
    """

    def __init__(self, queries: Tensor, k: int) -> None:
        self.queries = queries
        self._k, self._room = k, 3 * k + _SPARE
        count, device = len(queries), queries.device
        self._keys = torch.full((count, self._room), NO_KEY, device=device)
        self._used = torch.zeros(count, dtype=torch.int64, device=device)
        self.bar = queries.new_full((count, 1), -torch.inf)

    def see_all(self, products: Tensor, error: float, rows: Tensor, ids: Tensor) -> None:
        """`see`, in pieces where there is not room for all at once."""
        if not self.see(products, error, rows, ids):
            half = len(ids) // 2
            for piece in (slice(half), slice(half, None)):
                self.settle()
                self.see_all(products[:, piece], error, rows[piece], ids[piece])

    def see(self, products: Tensor, error: Tensor | float, rows: Tensor, ids: Tensor) -> bool:
        """Keep what reaches the bar of the rows of the bank; False, and nothing is kept, where there is
        not room for all of that.

        Args:
            products: (m, n) with rows (n, dim), at most `error` from their similarities.
        """
        reaches = products >= (self.bar - error).to(products.dtype)
        places = _places(reaches, at_most=len(products) * (self._k + _SPARE))
        if places is None:
            return False
        for _ in range(2):
            # where each query's part of the list begins; one place more, for its end
            starts = torch.searchsorted(
                places, torch.arange(len(products) + 1, device=rows.device) * len(rows)
            )
            counts = starts.diff()
            query = places // len(rows)
            row = places - query * len(rows)
            sims = _similarities(self.queries, rows, starts, query, row)
            if int((self._used + counts).max()) <= self._room:  # device sync
                # the first free place of a query's, less where its first one is in this list
                free = torch.arange(len(counts), device=rows.device) * self._room + self._used - starts[:-1]
                into = free.index_select(0, query) + torch.arange(len(query), device=rows.device)
                self._keys.view(-1)[into] = encode(sims, ids.index_select(0, row))
                self._used += counts
                return True
            self.settle()
            places = places[sims >= self.bar.view(-1)[query]]
        return False

    def raise_bar(self, rank: int) -> None:
        """To the similarity of that rank so far, if that is higher; rows below it that are here may stay."""
        used = self._keys[:, : int(self._used.max())]  # device sync
        sort_rows(used)
        if rank <= used.shape[1]:
            at_rank = decode(used[:, rank - 1 : rank])[0]  # -infinity where there are fewer
            self.bar = torch.maximum(self.bar, at_rank)

    def settle(self) -> Tensor:
        """Keep the k nearest alone; returns their keys (m, k), nearest first."""
        self.raise_bar(self._k)
        self._keys[:, self._k :] = NO_KEY
        self._used.clamp_(max=self._k)
        return self._keys[:, : self._k]


def _places(mask: Tensor, *, at_most: int) -> Tensor | None:
    """Where a matrix is true: numbers of its entries, row by row; None where they are more than that."""
    if mask.device.type != "cpu":
        # counted first: as numbers, all entries of a large block would take eight times the mask's memory
        return None if int(mask.count_nonzero()) > at_most else mask.flatten().nonzero().squeeze(1)
    places = torch.from_numpy(np.flatnonzero(mask.numpy()))  # four times as fast as torch
    return None if len(places) > at_most else places


def _similarities(queries: Tensor, rows: Tensor, starts: Tensor, query: Tensor, row: Tensor) -> Tensor:
    """Of queries[query] and rows[row], one sum each; `starts`, `row` are indices of a CSR matrix."""
    if queries.device.type != "cpu":
        pieces = zip(query.split(_AT_ONCE), row.split(_AT_ONCE), strict=True)
        return torch.cat([torch.linalg.vecdot(queries[q], rows[r]) for q, r in pieces])
    with warnings.catch_warnings():  # that CSR tensors are in beta
        warnings.simplefilter("ignore")
        wanted = torch.sparse_csr_tensor(
            starts.int(),
            row.int(),
            torch.zeros(len(row)),
            (len(queries), len(rows)),
            check_invariants=False,
        )
        # reads the rows where they lie: gathered for a product, they cost 15 times as much
        return torch.sparse.sampled_addmm(wanted, queries, rows.T, beta=0.0).values()
