"""k-NN accuracy where bank and queries are shared out over ranks; one search for every k and temperature.

    s_i = cos(query, bank_i)        vote(c) = sum over the k largest s_i with label c of exp(s_i / T)

Every rank holds its part of the bank (`search`), the labels of the whole bank (8 bytes a sample), and votes
on its own queries; only counts are summed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from selfmask_dist.evals.checks import check_labels
from selfmask_dist.evals.knn import knn_vote
from selfmask_dist.evals.search import MEMORY_MIB, Alone, Ranks, raise_together, search_rounds

KS = (1, 5, 10, 20, 100, 200)
TEMPERATURES = (0.07, 0.1, math.inf)


@dataclass(frozen=True)
class KNNResult:
    """Accuracies in [0, 1] by (k, temperature); temperature infinity is the plain vote.

    accuracy: over all queries. balanced: the mean over the classes that have queries. per_class: (classes,)
    float64, NaN where a class has none.
    """

    accuracy: dict[tuple[int, float], float]
    balanced: dict[tuple[int, float], float]
    per_class: dict[tuple[int, float], Tensor]


def global_knn(
    bank: Tensor,
    bank_labels: Tensor,
    bank_ids: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    *,
    num_classes: int,
    ks: Sequence[int] = KS,
    temperatures: Sequence[float] = TEMPERATURES,
    query_ids: Tensor | None = None,
    ranks: Ranks | None = None,
    memory_mib: float = MEMORY_MIB,
) -> KNNResult:
    """Accuracies of all ranks' queries by their neighbours in all ranks' banks, the same on every rank.
    Collective: every rank must call.

    Args:
        bank: (n, dim), bank_labels (n,), bank_ids (n,) ascending, each id on one rank: this rank's part.
        queries: (m, dim), query_labels (m,): this rank's part.
        query_ids: (m,), for queries out of the bank itself: each is left out of its own neighbours.
        memory_mib: bound on what the search needs beyond bank and queries.

    Raises:
        ValueError: on every rank alike: labels missing, or what `search_rounds` cannot search.
    """
    ranks = ranks or Alone()
    complaint = None
    try:
        for name, labels, features in (
            ("bank_labels", bank_labels, bank),
            ("query_labels", query_labels, queries),
        ):
            if len(features):
                check_labels(name, labels, len(features), num_classes)
    except ValueError as error:
        complaint = str(error)
    raise_together(complaint, ranks, bank.device)
    settings = [(k, temperature) for k in ks for temperature in temperatures]
    correct = torch.zeros(len(settings), num_classes, dtype=torch.int64, device=bank.device)
    place = 0
    labels_by_id: Tensor | None = None
    for sims, ids in search_rounds(
        bank,
        queries,
        k=max(ks),
        bank_ids=bank_ids,
        query_ids=query_ids,
        ranks=ranks,
        memory_mib=memory_mib,
    ):
        if labels_by_id is None:  # the search has checked the ids by now
            labels_by_id = _gather_labels(bank_labels, bank_ids, ranks)
        truth = query_labels[place : place + len(ids)]
        place += len(ids)
        if not len(ids):
            continue
        neighbours = labels_by_id[ids]
        for row, (k, temperature) in enumerate(settings):
            predicted = knn_vote(
                sims[:, :k], neighbours[:, :k], temperature=temperature, num_classes=num_classes
            )
            correct[row] += torch.bincount(truth[predicted == truth], minlength=num_classes)
    counts = torch.bincount(query_labels, minlength=num_classes)[None]
    *hits, total = ranks.sum(torch.cat([correct, counts])).double().cpu()
    per_class = {setting: hit / total for setting, hit in zip(settings, hits, strict=True)}
    return KNNResult(
        accuracy={s: float(hit.sum() / total.sum()) for s, hit in zip(settings, hits, strict=True)},
        balanced={setting: float(values.nanmean()) for setting, values in per_class.items()},
        per_class=per_class,
    )


def _gather_labels(labels: Tensor, ids: Tensor, ranks: Ranks) -> Tensor:
    """The labels of the whole bank, at their ids."""
    last = torch.zeros(ranks.size, dtype=torch.int64, device=ids.device)
    last[ranks.rank] = ids[-1] if len(ids) else 0
    table = torch.zeros(int(ranks.sum(last).max()) + 1, dtype=torch.int64, device=ids.device)
    table[ids] = labels
    return ranks.sum(table)
