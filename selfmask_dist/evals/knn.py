"""Classes by the nearest neighbours, or by the nearest text, of embeddings that are shared out over ranks.

    s_i = cos(query, bank_i)        vote(c) = sum over the k largest s_i with label c of exp(s_i / T)

The neighbours come from `search`, whose ties are decided; of equal votes the smaller class wins. One search
with the largest k serves every smaller k and every temperature; an infinite temperature is the plain vote.
Every rank holds its part of the bank, the labels of the whole bank (8 bytes a sample), and votes on its own
queries; only counts are summed.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from selfmask_dist.evals.embeddings import Embeddings
from selfmask_dist.evals.ranks import (
    Alone,
    Ranks,
    check_features,
    check_labels,
    gather_labels,
    raise_together,
    share,
)
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
    bank: Embeddings,
    queries: Embeddings,
    *,
    num_classes: int,
    ks: Sequence[int] = KS,
    temperatures: Sequence[float] = TEMPERATURES,
    **options: Unpack[SearchOptions],
) -> KNNResult:
    """Return the accuracies of all ranks' queries by their neighbours in all ranks' banks, on every rank.
    Collective: every rank must call.

    Args:
        bank, queries: this rank's parts; every sample has a label. The ids of queries are not looked at.
        options: of `search_rounds`. `query_ids` (m,), for queries out of the bank itself, leaves each out of
            its own neighbours.

    Raises:
        ValueError: on every rank alike: labels missing, or what `search_rounds` cannot search.
    """
    ranks = options.get("ranks") or Alone()
    raise_together(_complaint(bank, queries, num_classes), ranks, bank.features.device)
    settings = [(k, temperature) for k in ks for temperature in temperatures]
    correct = torch.zeros(len(settings), num_classes, dtype=torch.int64, device=bank.features.device)
    rounds = search_rounds(bank.features, queries.features, k=max(ks), bank_ids=bank.ids, **options)
    for sims, neighbours, truth in _labelled(rounds, bank, queries.labels, ranks):
        for row, (k, temperature) in enumerate(settings):
            predicted = knn_vote(
                sims[:, :k], neighbours[:, :k], temperature=temperature, num_classes=num_classes
            )
            correct[row] += torch.bincount(truth[predicted == truth], minlength=num_classes)
    counts = torch.bincount(queries.labels, minlength=num_classes)[None]
    *hits, total = ranks.sum(torch.cat([correct, counts])).double().cpu()
    per_class = {setting: hit / total for setting, hit in zip(settings, hits, strict=True)}
    return KNNResult(
        accuracy={s: float(hit.sum() / total.sum()) for s, hit in zip(settings, hits, strict=True)},
        balanced={setting: float(values.nanmean()) for setting, values in per_class.items()},
        per_class=per_class,
    )


def _complaint(bank: Embeddings, queries: Embeddings, num_classes: int) -> str | None:
    """Return what is wrong with this rank's labels, if anything; a rank may have no samples."""
    try:
        for name, part in (("bank_labels", bank), ("query_labels", queries)):
            if len(part.features):
                check_labels(name, part.labels, len(part.features), num_classes)
    except ValueError as error:
        return str(error)
    return None


def _labelled(
    rounds: Iterator[tuple[Tensor, Tensor]], bank: Embeddings, query_labels: Tensor, ranks: Ranks
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield each round's similarities and labels of the neighbours (m, k), and the queries' labels (m,)."""
    place = 0
    table: Tensor | None = None
    for sims, ids in rounds:
        if table is None:  # the search has checked the ids by now
            table = gather_labels(bank.labels, bank.ids, ranks)
        truth = query_labels[place : place + len(ids)]
        place += len(ids)
        if len(ids):
            yield sims, table[ids], truth


def knn_vote(sims: Tensor, neighbour_labels: Tensor, *, temperature: float, num_classes: int) -> Tensor:
    """Return the class with the largest softmax-weighted vote; of equal votes the smallest class.

    Args:
        sims: (m, k), nearest first.
        neighbour_labels: (m, k) int64, labels of those neighbours: `bank_labels[ids]`.
        temperature: of the weights exp(sim / temperature); above 0, and infinity makes them equal.

    Returns:
        Classes (m,) int64.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if sims.shape != neighbour_labels.shape:
        raise ValueError(
            f"sims {tuple(sims.shape)} and neighbour_labels {tuple(neighbour_labels.shape)} differ in shape"
        )
    check_labels("neighbour_labels", neighbour_labels.flatten(), neighbour_labels.numel(), num_classes)
    # the largest taken off: exp(1 / T) is infinite for T below 0.01
    weights = ((sims - sims[:, :1]).double() / temperature).exp()
    classes = [
        _vote_block(*block, num_classes)
        for block in zip(weights.split(4096), neighbour_labels.split(4096), strict=True)
    ]
    return torch.cat(classes)


def _vote_block(weights: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    votes = weights.new_zeros(len(weights), num_classes)
    # one at a time: the order of the sum, and so the result, is fixed on a GPU too
    for neighbour in range(weights.shape[1]):
        column = slice(neighbour, neighbour + 1)
        votes.scatter_add_(1, labels[:, column], weights[:, column])
    return votes.argmax(dim=1)  # the first of equal ones


def zero_shot(
    features: Tensor, labels: Tensor, text: Tensor, *, top: int = 5, ranks: Ranks | None = None
) -> tuple[float, float]:
    """Return how often the class of the nearest text is right, and how often the right one is among the `top`
    nearest (or among all, where there are fewer). Collective if `ranks` is.

    Args:
        features: (n, dim), labels (n,): this rank's images. text: (classes, dim), class c in row c.

    Raises:
        ValueError: on every rank alike: features or labels that cannot be used, or text of another dimension.
    """
    ranks = ranks or Alone()
    complaint = None
    try:
        if len(features) or ranks.size == 1:
            check_features("features", features)
            check_labels("labels", labels, len(features), len(text))
        if text.shape[1] != features.shape[1]:
            raise ValueError(f"images have {features.shape[1]} dimensions and texts have {text.shape[1]}")
    except ValueError as error:
        complaint = str(error)
    raise_together(complaint, ranks, features.device)
    logits = F.normalize(features.float()) @ F.normalize(text.float().to(features.device)).T
    nearest = logits.topk(min(top, len(text)), dim=1).indices
    hits = nearest == labels[:, None]
    return share(hits[:, 0], ranks), share(hits.any(dim=1), ranks)
