"""Exact nearest neighbours by cosine similarity, the bank being shared out over ranks.

    each round:  a block of every rank's queries goes to all ranks; each rank finds the k nearest in its part
                 of the bank; these go by all_to_all to the query's owner, who keeps the k nearest of all

Nothing is left to chance: of equal similarities the smaller id is the nearer neighbour, and on a CPU
similarities (float32) are the same bits under any number of ranks. No rank holds more of the bank than its
part, and what is computed at a time keeps to a bound in MiB. One process alone is the case of one rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from selfmask_dist.evals.memory import least_free_mib
from selfmask_dist.evals.ranks import Alone, Ranks, check_features, raise_together
from selfmask_dist.evals.search.local import Precision, decode, nearest, sort_rows

MEMORY_MIB = 256  # unless that is too little
_MAX_QUERIES = 4096  # at once; the bank is normalised anew for each round
_MIN_BLOCK = 256
_GOOD_ROUND = 4  # times the least memory, where no other bound is given


@dataclass(frozen=True)
class Plan:
    """How a search is cut up, and what it costs each rank.

    queries: of each rank in a round. block: rows of the bank multiplied at a time. work_bytes: an upper bound
    on memory beyond the rank's bank and queries. sent_bytes: over all rounds, to other ranks.
    """

    queries: int
    block: int
    rounds: int
    bank_bytes: int
    work_bytes: int
    sent_bytes: int

    @staticmethod
    def make(
        num_bank: int,
        num_queries: int,
        dim: int,
        *,
        k: int,
        num_ranks: int = 1,
        memory_mib: float | None = None,
        free_mib: float = math.inf,
        element_size: int = 4,
    ) -> Plan:
        """Return the plan for `num_bank` samples in the bank and `num_queries` queries over all ranks.

        Args:
            memory_mib: the bound on each rank's workspace. None: `MEMORY_MIB`, and where a round of a few
                queries of each rank needs more, as much as that.
            free_mib: what every rank has free; None takes at most half of it.

        Raises:
            ValueError: the memory is too small for one query of each rank.
        """
        # of a query: itself as sent, received, normalised and rounded; its candidates while they are found,
        # sorted and merged
        per_query = dim * (2 * element_size + 10) + 128 * (k + 32)
        least = 2 * max(num_ranks * per_query, _MIN_BLOCK * (12 * dim + 5 * num_ranks)) / 2**20
        asked = "" if memory_mib is None else f"memory_mib is {memory_mib:g}"
        if memory_mib is None:
            good = max(MEMORY_MIB, _GOOD_ROUND * least)
            memory_mib = max(min(good, free_mib / 2), MEMORY_MIB)
            asked = f"{free_mib:g} MiB are free on a rank, of which the search takes half"
        half = memory_mib * 2**20 / 2
        at_once = min(_MAX_QUERIES, int(half / per_query))
        per_rank = max(1, math.ceil(num_queries / num_ranks))
        most = min(at_once // num_ranks, per_rank)
        # rounds of equal length: what the last one lacks would be sent as zeros
        queries = math.ceil(per_rank / math.ceil(per_rank / most)) if most else 0
        # of a row of the bank: itself as float32, twice, and rounded; of it and a query, a product and a
        # comparison
        block = int(half / (12 * dim + 5 * max(1, queries) * num_ranks))
        if queries < 1 or block < _MIN_BLOCK:
            raise ValueError(
                f"{asked}; {dim} dimensions, k = {k} and {num_ranks} ranks need at least {math.ceil(least)}"
            )
        part = math.ceil(num_bank / num_ranks)
        rounds = math.ceil(num_queries / num_ranks / queries)
        away = rounds * queries * (num_ranks - 1)
        block = min(block, max(1, part))
        return Plan(
            queries,
            block,
            rounds,
            bank_bytes=part * dim * element_size,
            work_bytes=queries * num_ranks * (per_query + 5 * block) + block * 12 * dim,
            sent_bytes=away * (dim * element_size + k * 8),
        )


class SearchOptions(TypedDict, total=False):
    """Options of `search_rounds`, where they are explained."""

    query_ids: Tensor | None
    ranks: Ranks | None
    memory_mib: float | None
    precision: Precision


class BankOptions(SearchOptions, total=False):
    """Those, and the bank's ids, which a search for labels has anyway."""

    bank_ids: Tensor | None


def search(bank: Tensor, queries: Tensor, *, k: int, **options: Unpack[BankOptions]) -> tuple[Tensor, Tensor]:
    """Return the k nearest neighbours of this rank's queries in the whole bank; see `search_rounds`.

    Returns:
        Similarities (m, k) float32, nearest first, and ids (m, k) int64.
    """
    rounds = list(search_rounds(bank, queries, k=k, **options))
    return torch.cat([sims for sims, _ in rounds]), torch.cat([ids for _, ids in rounds])


def search_rounds(
    bank: Tensor,
    queries: Tensor,
    *,
    k: int,
    bank_ids: Tensor | None = None,
    query_ids: Tensor | None = None,
    ranks: Ranks | None = None,
    memory_mib: float | None = None,
    precision: Precision = "float32",
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the k nearest neighbours of a block of this rank's queries at a time, in their order:
    similarities (m, k) and ids (m, k). Every rank gets equally many blocks, without rows where it has fewer
    queries. Collective: every rank must call, and go through to the end.

    Args:
        bank: (n, dim), this rank's part, of any float type; a row of zeros has similarity 0 to everything.
        queries: (m, dim), this rank's, of the same type and device.
        bank_ids: (n,) int64, ascending, below 2^31, each on one rank; 0 ... n - 1 where there is one rank.
        query_ids: (m,), to leave out of each query's neighbours the sample with its own id.
        memory_mib: bound on what is needed beyond bank and queries; None: `MEMORY_MIB`, or what many ranks,
            dimensions or neighbours need, up to half of what the rank with the least has free.
        precision: of the products that find candidates. bf16 gives the same neighbours (see `local`),
            sooner where the processor multiplies bf16 faster.

    Raises:
        ValueError: on every rank alike: k is more than the bank holds, features that are not finite or do not
            fit together, wrong ids, or too little memory.
    """
    ranks = ranks or Alone()
    if bank_ids is None:
        assert ranks.size == 1, "the parts of a shared bank have ids"
        bank_ids = torch.arange(len(bank), device=bank.device)
    raise_together(_complaint(bank, bank_ids, queries, ranks), ranks, bank.device)
    sizes = bank.new_zeros(2, ranks.size, dtype=torch.int64)
    sizes[:, ranks.rank] = sizes.new_tensor([len(bank), len(queries)])
    sizes = ranks.sum(sizes)
    num_bank, most_queries = int(sizes[0].sum()), int(sizes[1].max())
    if not most_queries:
        raise ValueError("no rank has any queries")
    found = k if query_ids is None else k + 1  # one of them may be the query itself
    most = num_bank - (found - k)
    if not 1 <= k <= most:
        rest = "" if query_ids is None else " beside the query itself"
        raise ValueError(f"k is {k}, but the bank holds {most} samples{rest}; choose k from 1 to {most}")
    plan = Plan.make(
        num_bank,
        most_queries * ranks.size,
        bank.shape[1],
        k=found,
        num_ranks=ranks.size,
        memory_mib=memory_mib,
        free_mib=least_free_mib(ranks, bank.device) if memory_mib is None else math.inf,
        element_size=bank.element_size(),
    )
    for start in range(0, most_queries, plan.queries):
        mine = queries[start : start + plan.queries]
        sims, ids = _round(bank, bank_ids, mine, found, plan, ranks, precision)
        if query_ids is not None:
            sims, ids = _without(query_ids[start : start + plan.queries], sims, ids)
        yield sims, ids


def _complaint(bank: Tensor, bank_ids: Tensor, queries: Tensor, ranks: Ranks) -> str | None:
    """Return what is wrong with this rank's part, if anything; a rank may have no bank or no queries."""
    try:
        for name, features in (("bank", bank), ("queries", queries)):
            if features.ndim != 2 or len(features) or ranks.size == 1:
                check_features(name, features)
    except ValueError as error:
        return str(error)
    if bank.shape[1] != queries.shape[1]:
        return f"bank has {bank.shape[1]} dimensions and queries have {queries.shape[1]}"
    if bank_ids.shape != (len(bank),) or (bank_ids.diff() <= 0).any():
        return f"bank_ids must be {len(bank)} ids in ascending order, got shape {tuple(bank_ids.shape)}"
    if len(bank) and not 0 <= int(bank_ids[0]) <= int(bank_ids[-1]) < 2**31:
        return f"bank_ids must be from 0 to 2^31 - 1, got {int(bank_ids[0])} to {int(bank_ids[-1])}"
    return None


def _round(
    bank: Tensor,
    bank_ids: Tensor,
    mine: Tensor,
    k: int,
    plan: Plan,
    ranks: Ranks,
    precision: Precision,
) -> tuple[Tensor, Tensor]:
    """Return the neighbours of one block of this rank's queries, while it helps with every other rank's."""
    sent = mine.new_zeros(plan.queries, mine.shape[1])  # ranks that have no more queries send zeros
    sent[: len(mine)] = mine
    everyone = ranks.all_to_all(sent.expand(ranks.size, *sent.shape)).flatten(0, 1)
    normalised = F.normalize(everyone.float())
    keys = nearest(bank, bank_ids, normalised, k, block=plan.block, precision=precision)
    del sent, everyone, normalised
    keys = ranks.all_to_all(keys.view(ranks.size, plan.queries, k)).transpose(0, 1).flatten(1)[: len(mine)]
    sort_rows(keys)
    return decode(keys[:, :k])


def _without(query_ids: Tensor, sims: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return one neighbour less of each query: without itself, or the last one where it is not among them."""
    is_self = ids == query_ids[:, None]
    order = is_self.sort(dim=1, stable=True).indices[:, :-1]  # itself goes last
    return sims.gather(1, order), ids.gather(1, order)
