"""Embeddings in, numbers out: k-NN and linear probe. Knows no models, no files and no process groups."""

from selfmask_dist.evals.global_knn import KNNResult, global_knn
from selfmask_dist.evals.knn import knn_accuracy, knn_predict, knn_vote
from selfmask_dist.evals.probe import ProbeResult, linear_probe
from selfmask_dist.evals.search import Plan, Ranks, search

__all__ = [
    "KNNResult",
    "Plan",
    "ProbeResult",
    "Ranks",
    "global_knn",
    "knn_accuracy",
    "knn_predict",
    "knn_vote",
    "linear_probe",
    "search",
]
