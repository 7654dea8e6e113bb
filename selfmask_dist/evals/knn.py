"""Weighted k-nearest-neighbour classification of embeddings.

    s_i = cos(query, bank_i)        vote(c) = sum over the k largest s_i with label c of exp(s_i / T)

The neighbours come from `search`, whose ties are decided; of equal votes the smaller class wins. One search
with the largest k serves every smaller k and every temperature. An infinite temperature is the plain vote.
For a bank that is shared out over ranks see `global_knn`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from selfmask_dist.evals.checks import check_labels
from selfmask_dist.evals.search import search


def knn_vote(sims: Tensor, neighbour_labels: Tensor, *, temperature: float, num_classes: int) -> Tensor:
    """The class with the largest softmax-weighted vote; of equal votes the smallest class.

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
    for neighbour in range(
        weights.shape[1]
    ):  # one at a time: the order of the sum, and so the result, is fixed on a GPU too
        column = slice(neighbour, neighbour + 1)
        votes.scatter_add_(1, labels[:, column], weights[:, column])
    return votes.argmax(dim=1)  # the first of equal ones


def knn_predict(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, *, k: int, temperature: float, num_classes: int
) -> Tensor:
    """Classes (m,) int64 of queries (m, dim) by their k nearest neighbours in the bank (n, dim)."""
    check_labels("bank_labels", bank_labels, len(bank), num_classes)
    sims, ids = search(bank, queries, k=k)
    return knn_vote(sims, bank_labels[ids], temperature=temperature, num_classes=num_classes)


def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    *,
    ks: Sequence[int] = (200,),
    temperatures: Sequence[float] = (0.1,),
    num_classes: int,
) -> dict[tuple[int, float], float]:
    """Accuracy in [0, 1] for every (k, temperature), from one search. The defaults are the paper's."""
    check_labels("bank_labels", bank_labels, len(bank), num_classes)
    check_labels("query_labels", query_labels, len(queries), num_classes)
    sims, ids = search(bank, queries, k=max(ks))
    accuracies = {}
    for k in ks:
        for temperature in temperatures:
            labels = bank_labels[ids[:, :k]]
            predicted = knn_vote(sims[:, :k], labels, temperature=temperature, num_classes=num_classes)
            accuracies[k, temperature] = float((predicted == query_labels).double().mean())
    return accuracies
