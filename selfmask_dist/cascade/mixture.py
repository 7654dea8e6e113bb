"""A Gaussian mixture with full covariances, by EM over ranks.

    p(x) = sum_k w_k N(x; m_k, C_k)        r_ik = w_k N(x_i; m_k, C_k) / p(x_i)

    E: each rank sums, over its samples,  r,  r (x - a_k)  and  r (x - a_k)(x - a_k)^T
    M: w_k, m_k and C_k + reg_covar I from the sums over all ranks, the same on every rank

`a_k` is the cluster's last mean, so the covariance loses no digits to a large mean. One all-reduce of
K (1 + dim + dim^2) + 1 numbers an iteration. Starts, stopping rule and regularisation are scikit-learn's:
k-means first, then until the mean log-likelihood changes by less than `tolerance`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from selfmask_dist.cascade.kmeans import check_samples, kmeans
from selfmask_dist.cascade.pca import AllReduce, alone, row_blocks


@dataclass(frozen=True, eq=False)
class Mixture:
    """weights (K,), means (K, dim) and covariances (K, dim, dim), float64.

    lower_bound: mean log-likelihood of a sample before the last M step, by which restarts are compared.
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor
    lower_bound: float
    num_iterations: int
    is_converged: bool

    def log_densities(self, samples: Tensor) -> Tensor:
        """log(w_k N(x; m_k, C_k)), (n, K) float64, of samples (n, dim)."""
        dim = samples.shape[1]
        factors = _cholesky(self.covariances)
        log_scale = self.weights.log() - factors.diagonal(dim1=1, dim2=2).log().sum(dim=1)
        log_scale = log_scale - 0.5 * dim * math.log(2 * math.pi)
        rows = []
        for block in row_blocks(samples, dim * len(self.means)):
            centred = block.double() - self.means[:, None]  # (K, rows, dim)
            white = torch.linalg.solve_triangular(factors, centred.mT, upper=False)
            rows.append((log_scale[:, None] - 0.5 * white.square().sum(dim=1)).T)
        return torch.cat(rows)

    def probabilities(self, samples: Tensor) -> Tensor:
        """The r_ik (n, K), float64."""
        return self.log_densities(samples).softmax(dim=1)

    def assign(self, samples: Tensor) -> Tensor:
        """The most probable cluster (n,), int64."""
        return self.log_densities(samples).argmax(dim=1)

    @property
    def num_parameters(self) -> int:
        """Free ones, as the BIC counts them."""
        num_clusters, dim = self.means.shape
        return num_clusters - 1 + num_clusters * (dim + dim * (dim + 1) // 2)

    def reordered(self, order: Tensor) -> Mixture:
        """The same clusters, cluster i being what was cluster `order[i]`."""
        return replace(
            self,
            weights=self.weights[order],
            means=self.means[order],
            covariances=self.covariances[order],
        )

    def to(self, device: torch.device | str) -> Mixture:
        """The same on another device."""
        return replace(
            self,
            weights=self.weights.to(device),
            means=self.means.to(device),
            covariances=self.covariances.to(device),
        )

    def tensors(self) -> dict[str, Tensor]:
        return {
            "weights": self.weights,
            "means": self.means,
            "covariances": self.covariances,
            "lower_bound": torch.tensor(self.lower_bound, dtype=torch.float64),
            "num_iterations": torch.tensor(self.num_iterations),
            "is_converged": torch.tensor(self.is_converged),
        }

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> Mixture:
        return Mixture(
            tensors["weights"],
            tensors["means"],
            tensors["covariances"],
            float(tensors["lower_bound"]),
            int(tensors["num_iterations"]),
            bool(tensors["is_converged"]),
        )


def fit_mixture(
    samples: Tensor,
    ids: Tensor,
    *,
    num_clusters: int | Sequence[int],
    seed: int = 0,
    restarts: int = 1,
    reg_covar: float = 1e-6,
    tolerance: float = 1e-3,
    max_iterations: int = 100,
    all_reduce: AllReduce = alone,
) -> Mixture:
    """The best of `restarts` mixtures by their mean log-likelihood. Collective if `all_reduce` is.

    Args:
        samples: (n, dim), this rank's part.
        ids: (n,) int64, their global ids: 0 ... total - 1, each on one rank.
        num_clusters: or several, of which the one with the smallest Bayesian information criterion is taken,
            -2 log-likelihood + parameters log(samples); of equal ones the first.
        reg_covar: added to the variances; in the samples' unit, squared.

    Raises:
        ValueError: on every rank alike, for NaN, wrong ids, too few samples, or a cluster that collapsed.
    """
    candidates = [num_clusters] if isinstance(num_clusters, int) else list(num_clusters)
    if not candidates or restarts < 1:
        raise ValueError(f"nothing to fit: num_clusters is {num_clusters} and restarts is {restarts}")
    samples = samples.double()
    total, _ = check_samples(samples, ids, max(candidates), all_reduce)
    scored = []
    for count in candidates:
        best: Mixture | None = None
        for restart in range(restarts):
            start = kmeans(samples, ids, num_clusters=count, seed=(seed, restart), all_reduce=all_reduce)
            responsibilities = torch.nn.functional.one_hot(start.assign(samples), count).double()
            found = expectation_maximization(
                samples,
                responsibilities,
                reg_covar=reg_covar,
                tolerance=tolerance,
                max_iterations=max_iterations,
                all_reduce=all_reduce,
            )
            # by more than rounding, as in kmeans
            if best is None or found.lower_bound > best.lower_bound + 1e-9 * abs(best.lower_bound):
                best = found
        assert best is not None
        if len(candidates) == 1:
            return best
        likelihood = float(all_reduce(best.log_densities(samples).logsumexp(dim=1).sum()))
        scored.append((best.num_parameters * math.log(total) - 2 * likelihood, best))
    return min(scored, key=lambda pair: pair[0])[1]


def expectation_maximization(
    samples: Tensor,
    responsibilities: Tensor,
    *,
    reg_covar: float = 1e-6,
    tolerance: float = 1e-3,
    max_iterations: int = 100,
    all_reduce: AllReduce = alone,
) -> Mixture:
    """EM from the responsibilities (n, K) of samples (n, dim), float64. Collective if `all_reduce` is."""
    num_clusters, dim = responsibilities.shape[1], samples.shape[1]
    summed = all_reduce(torch.cat([samples.sum(dim=0), samples.new_tensor([len(samples)])]))
    total = int(summed[-1])
    anchor = (summed[:-1] / total).expand(num_clusters, dim)
    stats = _Sums(num_clusters, dim, samples.device)
    for block, part in zip(row_blocks(samples, dim), row_blocks(responsibilities, dim), strict=True):
        stats.add(block, part, anchor)
    stats.reduce(all_reduce)
    mixture = _maximize(stats, anchor, reg_covar, -math.inf, 0, False)
    for iteration in range(1, max_iterations + 1):
        stats = _Sums(num_clusters, dim, samples.device)
        for block in row_blocks(samples, dim):
            log_densities = mixture.log_densities(block)
            log_likelihoods = log_densities.logsumexp(dim=1, keepdim=True)
            stats.add(block, (log_densities - log_likelihoods).exp(), mixture.means)
            stats.likelihood += log_likelihoods.sum()
        stats.reduce(all_reduce)
        bound = float(stats.likelihood) / total
        is_converged = abs(bound - mixture.lower_bound) < tolerance
        mixture = _maximize(stats, mixture.means, reg_covar, bound, iteration, is_converged)
        if is_converged:
            break
    return mixture


class _Sums:
    """The sums of an E step: views into one flat vector, which a single all-reduce sums over ranks."""

    def __init__(self, num_clusters: int, dim: int, device: torch.device) -> None:
        shapes = ((num_clusters,), (num_clusters, dim), (num_clusters, dim, dim), ())
        sizes = [math.prod(shape) for shape in shapes]
        self._flat = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
        views = [part.view(shape) for part, shape in zip(self._flat.split(sizes), shapes, strict=True)]
        self.counts, self.first, self.second, self.likelihood = views

    def add(self, samples: Tensor, responsibilities: Tensor, anchor: Tensor) -> None:
        self.counts += responsibilities.sum(dim=0)
        for cluster, point in enumerate(anchor):
            shifted = samples - point
            weighted = shifted * responsibilities[:, cluster, None]
            self.first[cluster] += weighted.sum(dim=0)
            self.second[cluster].addmm_(weighted.T, shifted)

    def reduce(self, all_reduce: AllReduce) -> None:
        self._flat.copy_(all_reduce(self._flat))


def _maximize(
    stats: _Sums, anchor: Tensor, reg_covar: float, bound: float, iteration: int, is_converged: bool
) -> Mixture:
    counts = stats.counts + 10 * torch.finfo(torch.float64).eps  # as scikit-learn: an empty cluster is no 0/0
    delta = stats.first / counts[:, None]
    covariances = stats.second / counts[:, None, None] - delta[:, :, None] * delta[:, None, :]
    covariances.diagonal(dim1=1, dim2=2).add_(reg_covar)
    weights = counts / counts.sum()
    return Mixture(weights, anchor + delta, covariances, bound, iteration, is_converged)


def _cholesky(covariances: Tensor) -> Tensor:
    factors, info = torch.linalg.cholesky_ex(covariances)
    if (info != 0).any():
        cluster = int((info != 0).nonzero()[0])
        raise ValueError(
            f"cluster {cluster} of the mixture collapsed onto too few samples (its covariance is singular); "
            "ask for fewer clusters or components, or a larger reg_covar"
        )
    return factors
