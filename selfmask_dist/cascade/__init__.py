"""The cascade's numerics: which expert a sample belongs to, and one embedding out of several.

    pca -> clusters -> router        pca -> combine

Tensors in, tensors out. Knows no models, no files, no scheduler and no process groups: an `all_reduce` that
sums over ranks is passed in, and is handed tensors on the device of the embeddings.
"""

from selfmask_dist.cascade.clusters import KMeans, Mixture, fit_kmeans, fit_mixture
from selfmask_dist.cascade.combine import MODES, Combination
from selfmask_dist.cascade.router import Router
from selfmask_dist.parallel.pca import PCA, AllReduce, fit_pca

__all__ = [
    "MODES",
    "PCA",
    "AllReduce",
    "Combination",
    "KMeans",
    "Mixture",
    "Router",
    "fit_kmeans",
    "fit_mixture",
    "fit_pca",
]
