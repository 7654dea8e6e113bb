"""Which expert a sample belongs to: the paper's router (section 3.4).

    z = whitened PCA of x / |x|        expert(x) = the most probable cluster of z

The embeddings are the dispatcher's, L2-normalised as in the authors' code. Clusters are in the order of their
size, largest first, so their numbers do not depend on how the fit was started.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from selfmask_dist.cascade.clusters import KMeans, Mixture, fit_kmeans, fit_mixture
from selfmask_dist.parallel.pca import PCA, AllReduce, alone, fit_pca, row_blocks

METHODS: dict[str, type[Mixture] | type[KMeans]] = {"gmm": Mixture, "kmeans": KMeans}
REG_COVAR = 0.05
"""Added to the variances of the mixture, whose data have variance 1. The authors' data have variance 1/n and
scikit-learn's 1e-6 is added: 0.05 of the variance at their n of 50,000."""


@dataclass(frozen=True, eq=False)
class Router:
    """Embeddings (n, dim) -> clusters. `sizes` (K,) int64: samples of each cluster in the data of the fit."""

    pca: PCA
    clusters: Mixture | KMeans
    sizes: Tensor

    @staticmethod
    def fit(
        embeddings: Tensor,
        ids: Tensor,
        *,
        num_clusters: int | Sequence[int] = 5,
        num_components: int = 20,
        method: str = "gmm",
        seed: int = 0,
        restarts: int = 5,
        all_reduce: AllReduce = alone,
    ) -> Router:
        """Return a router fitted on the embeddings of all ranks. Collective if `all_reduce` is.

        Args:
            embeddings: (n, dim), this rank's part, of any float type.
            ids: (n,) int64, their global ids: 0 ... total - 1, each on one rank.
            num_clusters: or several, of which the Bayesian information criterion chooses (gmm only).
            method: gmm or kmeans.
            restarts: of which the best is taken.

        Raises:
            ValueError: on every rank alike, for NaN, wrong ids, too few samples, or an empty cluster.
        """
        if method not in METHODS:
            raise ValueError(f"router method {method!r} is unknown; choose from {', '.join(METHODS)}")
        pca = fit_pca(_normalized(embeddings), num_components=num_components, all_reduce=all_reduce)
        pca.check_whitening()
        reduced = _reduce(embeddings, pca)
        clusters: Mixture | KMeans
        if method == "gmm":
            clusters = fit_mixture(
                reduced,
                ids,
                num_clusters=num_clusters,
                seed=seed,
                restarts=restarts,
                reg_covar=REG_COVAR,
                all_reduce=all_reduce,
            )
        else:
            if not isinstance(num_clusters, int):
                raise ValueError(f"k-means takes one number of clusters, got {tuple(num_clusters)}; use gmm")
            clusters = fit_kmeans(
                reduced, ids, num_clusters=num_clusters, seed=seed, restarts=restarts, all_reduce=all_reduce
            )
        sizes = all_reduce(torch.bincount(clusters.assign(reduced), minlength=len(clusters.means)))
        keys = zip((-sizes).tolist(), clusters.means[:, 0].tolist(), strict=True)
        ranking = [index for _, index in sorted((key, index) for index, key in enumerate(keys))]
        order = torch.tensor(ranking, device=sizes.device)
        router = Router(pca, clusters.reordered(order), sizes[order])
        router.check_sizes(at_least=1)
        return router

    def check_sizes(self, *, at_least: int) -> None:
        """Raise a ValueError where a cluster has fewer samples than `at_least`."""
        sizes = self.sizes.tolist()
        if sizes[-1] < at_least:
            what = "is empty" if sizes[-1] == 0 else f"has {sizes[-1]} samples, fewer than {at_least}"
            raise ValueError(
                f"the router's smallest cluster {what} (sizes: {', '.join(map(str, sizes))}); "
                "ask for fewer clusters, or give more images"
            )

    @property
    def num_clusters(self) -> int:
        """How many clusters, and so experts, there are."""
        return len(self.sizes)

    def reduce(self, embeddings: Tensor) -> Tensor:
        """Return what is clustered: the whitened components (n, num_components) float64."""
        return _reduce(embeddings, self.pca)

    def assign(self, embeddings: Tensor) -> Tensor:
        """Return the cluster (n,) int64 of each embedding (n, dim)."""
        return self.clusters.assign(self.reduce(embeddings))

    def probabilities(self, embeddings: Tensor) -> Tensor:
        """Return (n, K) float64, rows summing to 1; zeros and ones with k-means."""
        return self.clusters.probabilities(self.reduce(embeddings))

    def to(self, device: torch.device | str) -> Router:
        """Return the same on another device: that of the embeddings it is to be given."""
        return Router(self.pca.to(device), self.clusters.to(device), self.sizes.to(device))

    def tensors(self) -> dict[str, Tensor]:
        """Return everything, by name; `from_tensors` makes the same router of it."""
        method = next(name for name, kind in METHODS.items() if isinstance(self.clusters, kind))
        return {
            **{f"pca.{name}": tensor for name, tensor in self.pca.tensors().items()},
            **{f"{method}.{name}": tensor for name, tensor in self.clusters.tensors().items()},
            "sizes": self.sizes,
        }

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> Router:
        """Return the router that `tensors()` was asked of. Raises ValueError for other tensors."""
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts.setdefault(part, {})[rest] = tensor
        method = next((name for name in METHODS if name in parts), None)
        if method is None or "pca" not in parts or "sizes" not in parts:
            raise ValueError(f"these are not a router's tensors: {', '.join(tensors)}")
        clusters = METHODS[method].from_tensors(parts[method])
        return Router(PCA.from_tensors(parts["pca"]), clusters, tensors["sizes"])


def _normalized(embeddings: Tensor) -> Iterator[Tensor]:
    for block in row_blocks(embeddings, embeddings.shape[1]):
        yield F.normalize(block.double())


def _reduce(embeddings: Tensor, pca: PCA) -> Tensor:
    """Return the whitened components (n, num_components), float64."""
    return torch.cat([pca.transform(block, whiten=True) for block in _normalized(embeddings)])
