"""Encoder and images to embeddings, and embeddings to numbers: k-NN, probes, low-shot, without labels.

embed, store     images -> embeddings, in memory or on disk
search           exact nearest neighbours of a bank that ranks share
knn, probe, probe_heads, low_shot, label_free    embeddings -> numbers; these know neither models nor files
measure, progress    all of it, for a run in training; a restart goes on with it
"""

from selfmask_dist.evals.embeddings import Embeddings, mean_embedding
from selfmask_dist.evals.knn import KNNResult, global_knn, knn_vote, zero_shot
from selfmask_dist.evals.label_free import kept, measure_shape, neighbours
from selfmask_dist.evals.low_shot import LowShotResult, low_shot
from selfmask_dist.evals.probe import ProbeResult, linear_probe, mean_logits_accuracy
from selfmask_dist.evals.probe_heads import HeadsResult, probe_heads
from selfmask_dist.evals.ranks import Alone, Ranks
from selfmask_dist.evals.search import Plan, search

__all__ = [
    "Alone",
    "Embeddings",
    "HeadsResult",
    "KNNResult",
    "LowShotResult",
    "Plan",
    "ProbeResult",
    "Ranks",
    "global_knn",
    "kept",
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
