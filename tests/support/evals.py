"""k-NN and probes of plain tensors on one process."""

from typing import Any

from torch import Tensor

from selfmask_dist import evals
from selfmask_dist.evals import Embeddings, HeadsResult, ProbeResult


def knn_predict(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, *, k: int, num_classes: int, temperature: float = 0.1
) -> Tensor:
    """Return classes (m,) of queries (m, dim) by their k nearest neighbours in the bank (n, dim)."""
    sims, ids = evals.search(bank, queries, k=k)
    return evals.knn_vote(sims, bank_labels[ids], temperature=temperature, num_classes=num_classes)


def knn_accuracy(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor, **settings: Any
) -> float:
    """Return the share of queries whose predicted class is their label; `settings` as in `knn_predict`."""
    predicted = knn_predict(bank, bank_labels, queries, **settings)
    return float((predicted == query_labels).double().mean())


def linear_probe(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, **options: Any
) -> ProbeResult:
    """Return `evals.linear_probe` of samples numbered from 0."""
    return evals.linear_probe(Embeddings.of(train, train_labels), Embeddings.of(test, test_labels), **options)


def probe_heads(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, **options: Any
) -> HeadsResult:
    """Return `evals.probe_heads` of samples numbered from 0."""
    return evals.probe_heads(Embeddings.of(train, train_labels), Embeddings.of(test, test_labels), **options)
