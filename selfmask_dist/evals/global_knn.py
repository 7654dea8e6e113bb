"""k-NN accuracy where bank and queries are shared out over ranks; one search for every k and temperature.

    s_i = cos(query, bank_i)        vote(c) = sum over the k largest s_i with label c of exp(s_i / T)

Every rank holds its part of the bank (`search`), the labels of the whole bank (8 bytes a sample), and votes
on its own queries; only counts are summed.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Unpack

import torch
from torch import Tensor

from selfmask_dist.evals.checks import check_labels
from selfmask_dist.evals.knn import knn_vote
from selfmask_dist.evals.ranks import Alone, Ranks, gather_labels, raise_together
from selfmask_dist.evals.search import SearchOptions, search_rounds

KS = (1, 5, 10, 20, 100, 200)
TEMPERATURES = (0.07, 0.1, math.inf)
Setting = tuple[int, float]  # k and temperature


@dataclass(frozen=True)
class KNNResult:
    """Accuracies in [0, 1] by (k, temperature); temperature infinity is the plain vote.

    accuracy: over all queries. balanced: the mean over the classes that have queries. per_class: (classes,)
    float64, NaN where a class has none.
    """

    accuracy: dict[Setting, float]
    balanced: dict[Setting, float]
    per_class: dict[Setting, Tensor]


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
    **options: Unpack[SearchOptions],
) -> KNNResult:
    """Accuracies of all ranks' queries by their neighbours in all ranks' banks, the same on every rank.
    Collective: every rank must call.

    Args:
        bank: (n, dim), bank_labels (n,), bank_ids (n,) ascending, each id on one rank: this rank's part.
        queries: (m, dim), query_labels (m,): this rank's part.
        options: of `search_rounds`. `query_ids` (m,), for queries out of the bank itself, leaves each out of
            its own neighbours.

    Raises:
        ValueError: on every rank alike: labels missing, or what `search_rounds` cannot search.
    """
    ranks = options.get("ranks") or Alone()
    named = {"bank_labels": (bank_labels, bank), "query_labels": (query_labels, queries)}
    raise_together(_complaint(named, num_classes), ranks, bank.device)
    settings = [(k, temperature) for k in ks for temperature in temperatures]
    correct = torch.zeros(len(settings), num_classes, dtype=torch.int64, device=bank.device)
    rounds = search_rounds(bank, queries, k=max(ks), bank_ids=bank_ids, **options)
    for sims, neighbours, truth in _labelled(rounds, bank_labels, bank_ids, query_labels, ranks):
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


def _complaint(named: dict[str, tuple[Tensor, Tensor]], num_classes: int) -> str | None:
    try:
        for name, (labels, features) in named.items():
            if len(features):
                check_labels(name, labels, len(features), num_classes)
    except ValueError as error:
        return str(error)
    return None


def _labelled(
    rounds: Iterator[tuple[Tensor, Tensor]],
    bank_labels: Tensor,
    bank_ids: Tensor,
    query_labels: Tensor,
    ranks: Ranks,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Similarities and labels of the neighbours (m, k), and the queries' own labels (m,), of each round."""
    place = 0
    table: Tensor | None = None
    for sims, ids in rounds:
        if table is None:  # the search has checked the ids by now
            table = gather_labels(bank_labels, bank_ids, ranks)
        truth = query_labels[place : place + len(ids)]
        place += len(ids)
        if len(ids):
            yield sims, table[ids], truth
