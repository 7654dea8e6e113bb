"""Embeddings in, numbers out: k-NN and linear probe. Knows no models, no files and no process groups."""

from selfmask_dist.evals.knn import knn_accuracy, knn_predict, knn_search, knn_vote
from selfmask_dist.evals.probe import ProbeResult, linear_probe

__all__ = ["ProbeResult", "knn_accuracy", "knn_predict", "knn_search", "knn_vote", "linear_probe"]
