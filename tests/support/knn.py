"""k-NN on one process, as a reference: one search, one vote for each k."""

import torch
from torch import Tensor

from selfmask_dist import evals


def knn_predict(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, *, k: int, num_classes: int, temperature: float = 0.1
) -> Tensor:
    """Return classes (m,) of queries (m, dim) by their k nearest neighbours in the bank (n, dim)."""
    sims, ids = evals.search(bank, queries, k=k)
    return evals.knn_vote(sims, bank_labels[ids], temperature=temperature, num_classes=num_classes)


def knn_accuracy(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor, **settings: float
) -> float:
    """Return the share of queries whose predicted class is their label; `settings` as in `knn_predict`."""
    predicted = knn_predict(bank, bank_labels, queries, **settings)  # type: ignore[arg-type]
    return float((predicted == query_labels).to(torch.float64).mean())
