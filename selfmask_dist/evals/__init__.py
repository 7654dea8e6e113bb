"""Embeddings in, numbers out: k-NN, probes, low-shot. Knows no models, no files and no process groups."""

from selfmask_dist.evals.ensemble import mean_embedding, mean_logits_accuracy
from selfmask_dist.evals.global_knn import KNNResult, global_knn
from selfmask_dist.evals.knn import knn_accuracy, knn_predict, knn_vote
from selfmask_dist.evals.label_free import kept, measure_shape, neighbours
from selfmask_dist.evals.low_shot import LowShotResult, low_shot
from selfmask_dist.evals.probe import ProbeResult, linear_probe
from selfmask_dist.evals.probe_heads import HeadsResult, probe_heads
from selfmask_dist.evals.ranks import Alone, Ranks
from selfmask_dist.evals.search import Plan, search
from selfmask_dist.evals.zero_shot import zero_shot

__all__ = [
    "Alone",
    "HeadsResult",
    "KNNResult",
    "LowShotResult",
    "Plan",
    "ProbeResult",
    "Ranks",
    "global_knn",
    "kept",
    "knn_accuracy",
    "knn_predict",
    "knn_vote",
    "linear_probe",
    "low_shot",
    "mean_embedding",
    "mean_logits_accuracy",
    "measure_shape",
    "neighbours",
    "probe_heads",
    "search",
    "zero_shot",
]
