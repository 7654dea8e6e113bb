"""Weighted k-nearest-neighbour classification of embeddings.

    s_i = cos(query, bank_i)        vote(c) = sum over the k largest s_i with label c of exp(s_i / T)

Nothing is left to chance: of equal similarities the smaller bank id is the nearer neighbour, of equal votes
the smaller class wins. Similarities are float32 and computed in blocks, so memory does not grow with bank x
queries. The search is separate from the vote: one search with the largest k serves every smaller k and every
temperature.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from selfmask_dist.evals.checks import check_features, check_labels

_BANK_BLOCK = 16384  # with the query block below: 64 MiB of float32 similarities at a time
_QUERY_BLOCK = 1024


def knn_search(bank: Tensor, queries: Tensor, *, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest neighbours of each query by cosine similarity, nearest first.

    Args:
        bank: (n, dim), any float type; a row of zeros has similarity 0 to everything.
        queries: (m, dim), on the same device.

    Returns:
        Similarities (m, k) float32 and bank ids (m, k) int64.

    Raises:
        ValueError: k is not in [1, n], or features are not finite or do not fit together.
    """
    check_features("bank", bank)
    check_features("queries", queries)
    if bank.shape[1] != queries.shape[1]:
        raise ValueError(f"bank has {bank.shape[1]} dimensions and queries have {queries.shape[1]}")
    if not 1 <= k <= len(bank):
        raise ValueError(f"k is {k}, but the bank holds {len(bank)} samples; choose k from 1 to {len(bank)}")
    bank, queries = F.normalize(bank.float()), F.normalize(queries.float())
    found = [_search_block(bank, block, k) for block in queries.split(_QUERY_BLOCK)]
    return torch.cat([sims for sims, _ in found]), torch.cat([ids for _, ids in found])


def _search_block(bank: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Go over the bank in blocks and keep the k best so far."""
    sims = queries.new_empty(len(queries), 0)
    ids = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(bank), _BANK_BLOCK):
        block_sims, block_ids = _top(queries @ bank[start : start + _BANK_BLOCK].T, k)
        # both parts are in order and the ids so far are smaller: a stable sort keeps the smaller id first
        sims, order = torch.cat([sims, block_sims], dim=1).sort(dim=1, descending=True, stable=True)
        ids = torch.cat([ids, block_ids + start], dim=1).gather(1, order)
        sims, ids = sims[:, :k], ids[:, :k]
    return sims, ids


def _top(sims: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row in order, equal ones by column: a stable sort at the price of topk."""
    if sims.shape[1] <= k:
        return sims.sort(dim=1, descending=True, stable=True)
    values, columns = sims.topk(k + 1, dim=1)
    is_cut_tied = values[:, k - 1] == values[:, k]  # which of the equal ones topk kept is then undefined
    columns = columns[:, :k].sort(dim=1).values
    values, order = sims.gather(1, columns).sort(dim=1, descending=True, stable=True)
    columns = columns.gather(1, order)
    if is_cut_tied.any():  # device sync, once for each block
        values_tied, columns_tied = sims[is_cut_tied].sort(dim=1, descending=True, stable=True)
        values[is_cut_tied], columns[is_cut_tied] = values_tied[:, :k], columns_tied[:, :k]
    return values, columns


def knn_vote(sims: Tensor, neighbour_labels: Tensor, *, temperature: float, num_classes: int) -> Tensor:
    """The class with the largest softmax-weighted vote; of equal votes the smallest class.

    Args:
        sims: (m, k), nearest first.
        neighbour_labels: (m, k) int64, labels of those neighbours: `bank_labels[ids]`.
        temperature: of the weights exp(sim / temperature); above 0.

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
    sims, ids = knn_search(bank, queries, k=k)
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
    sims, ids = knn_search(bank, queries, k=max(ks))
    accuracies = {}
    for k in ks:
        for temperature in temperatures:
            labels = bank_labels[ids[:, :k]]
            predicted = knn_vote(sims[:, :k], labels, temperature=temperature, num_classes=num_classes)
            accuracies[k, temperature] = float((predicted == query_labels).double().mean())
    return accuracies
