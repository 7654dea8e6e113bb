"""Clusters of the router's whitened rows: k-means, or a Gaussian mixture with full covariances.

    p(x) = sum_k w_k N(x; m_k, C_k)        r_ik = w_k N(x_i; m_k, C_k) / p(x_i)

scikit-learn fits, on one process: the one that holds the sample of id 0. The rows of all ranks are gathered
in the order of their ids, so a fit depends neither on the number of ranks nor on who holds what; libraries
keep to one thread meanwhile, so that its bits do not depend on the machine's cores. What is done with the
clusters (assigning samples, files) is torch, on every rank.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Self, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from selfmask_dist.parallel.pca import AllReduce, alone, row_blocks

MAX_FIT_ROWS = 2**19
"""Rows that a fit sees at most, drawn by the seed; all rows are assigned. Every rank holds that many while
they are gathered (float32: 42 MB at 20 dimensions), and one EM iteration on them takes about a second."""


@dataclass(frozen=True, eq=False)
class Clusters:
    """What `KMeans` and `Mixture` have in common: tensors with one row for each cluster, and numbers."""

    def reordered(self, order: Tensor) -> Self:
        """Return the same clusters, cluster i being what was cluster `order[i]`."""
        return self._changed(lambda tensor: tensor[order])

    def to(self, device: torch.device | str) -> Self:
        """Return the same on another device."""
        return self._changed(lambda tensor: tensor.to(device))

    def _changed(self, change_fn: Callable[[Tensor], Tensor]) -> Self:
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: change_fn(tensor) for name, tensor in tensors.items()})

    def tensors(self) -> dict[str, Tensor]:
        """Return everything, by name; `from_tensors` makes the same clusters of it."""
        return {
            name: torch.tensor(value, dtype=torch.float64)
            if isinstance(value, float)
            else torch.as_tensor(value)
            for name, value in vars(self).items()
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Return the clusters that `tensors()` was asked of."""
        named = {field.name: tensors[field.name] for field in fields(cls)}
        return cls(**{name: tensor if tensor.ndim else tensor.item() for name, tensor in named.items()})


@dataclass(frozen=True, eq=False)
class KMeans(Clusters):
    """Centers (K, dim) float64 and `inertia`, the mean squared distance of a fitted row to its centre."""

    centers: Tensor
    inertia: float
    num_iterations: int

    @property
    def means(self) -> Tensor:
        """(K, dim): the centres."""
        return self.centers

    def assign(self, samples: Tensor) -> Tensor:
        """Return the nearest centre (n,) int64 of each sample (n, dim)."""
        nearest = [
            _distances(block, self.centers).argmin(dim=1) for block in row_blocks(samples, samples.shape[1])
        ]
        return torch.cat(nearest)

    def probabilities(self, samples: Tensor) -> Tensor:
        """Return (n, K) float64, 1 for the nearest centre: k-means has no doubts."""
        return torch.nn.functional.one_hot(self.assign(samples), len(self.centers)).double()


@dataclass(frozen=True, eq=False)
class Mixture(Clusters):
    """weights (K,), means (K, dim) and covariances (K, dim, dim), float64.

    lower_bound: mean log-likelihood of a fitted row before the last M step, by which restarts are compared.
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor
    lower_bound: float
    num_iterations: int
    is_converged: bool

    def log_densities(self, samples: Tensor) -> Tensor:
        """Return log(w_k N(x; m_k, C_k)), (n, K) float64, of samples (n, dim)."""
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
        """Return the r_ik (n, K), float64."""
        return self.log_densities(samples).softmax(dim=1)

    def assign(self, samples: Tensor) -> Tensor:
        """Return the most probable cluster (n,), int64."""
        return self.log_densities(samples).argmax(dim=1)

    @property
    def num_parameters(self) -> int:
        """Free ones, as the BIC counts them."""
        num_clusters, dim = self.means.shape
        return num_clusters - 1 + num_clusters * (dim + dim * (dim + 1) // 2)


# ---- fitting

C = TypeVar("C", bound=Clusters)


def fit_kmeans(
    samples: Tensor,
    ids: Tensor,
    *,
    num_clusters: int,
    seed: int = 0,
    restarts: int = 1,
    all_reduce: AllReduce = alone,
) -> KMeans:
    """Return the best of `restarts` runs by inertia. Collective if `all_reduce` is.

    Args:
        samples: (n, dim), this rank's part.
        ids: (n,) int64, their global ids: 0 ... total - 1, each on one rank.

    Raises:
        ValueError: on every rank alike, for NaN, wrong ids, or fewer different samples than clusters.
    """
    _, rows = gather_rows(samples, ids, num_clusters=num_clusters, seed=seed, all_reduce=all_reduce)

    def fit(random: np.random.RandomState) -> KMeans:
        from sklearn.cluster import KMeans as Estimator

        found = Estimator(num_clusters, n_init=1, random_state=random).fit(rows)
        return KMeans(torch.from_numpy(found.cluster_centers_), found.inertia_ / len(rows), found.n_iter_)

    empty = KMeans(samples.new_zeros(num_clusters, rows.shape[1], dtype=torch.float64), 0.0, 0)
    is_here = bool((ids == 0).any())
    return min(_fit(fit, empty, seed, restarts, is_here, all_reduce), key=lambda found: found.inertia)


def fit_mixture(
    samples: Tensor,
    ids: Tensor,
    *,
    num_clusters: int | Sequence[int],
    seed: int = 0,
    restarts: int = 1,
    reg_covar: float = 1e-6,
    all_reduce: AllReduce = alone,
) -> Mixture:
    """Return the best of `restarts` mixtures by their mean log-likelihood. Collective if `all_reduce` is.

    Args:
        samples: (n, dim), this rank's part.
        ids: (n,) int64, their global ids: 0 ... total - 1, each on one rank.
        num_clusters: or several, of which the one with the smallest Bayesian information criterion is taken,
            -2 log-likelihood + parameters log(samples), over all samples; of equal ones the first.
        reg_covar: added to the variances; in the samples' unit, squared.

    Raises:
        ValueError: on every rank alike, for NaN, wrong ids, too few samples, or a cluster that collapsed.
    """
    candidates = [num_clusters] if isinstance(num_clusters, int) else list(num_clusters)
    if not candidates:
        raise ValueError("no number of clusters is given to choose from")
    total, rows = gather_rows(samples, ids, num_clusters=max(candidates), seed=seed, all_reduce=all_reduce)
    is_here, dim = bool((ids == 0).any()), rows.shape[1]
    scored = []
    for count in candidates:

        def fit(random: np.random.RandomState, count: int = count) -> Mixture:
            from sklearn.mixture import GaussianMixture

            found = GaussianMixture(count, reg_covar=reg_covar, random_state=random).fit(rows)
            return Mixture(
                torch.from_numpy(found.weights_),
                torch.from_numpy(found.means_),
                torch.from_numpy(found.covariances_),
                float(found.lower_bound_),
                found.n_iter_,
                found.converged_,
            )

        zeros = samples.new_zeros(count, dim, dim, dtype=torch.float64)
        empty = Mixture(zeros[:, 0, 0], zeros[:, 0], zeros, 0.0, 0, False)
        runs = _fit(fit, empty, seed, restarts, is_here, all_reduce)
        best = max(runs, key=lambda found: found.lower_bound)
        if len(candidates) == 1:
            return best
        likelihood = float(all_reduce(best.log_densities(samples).logsumexp(dim=1).sum()))
        scored.append((best.num_parameters * math.log(total) - 2 * likelihood, best))
    return min(scored, key=lambda pair: pair[0])[1]


def gather_rows(
    samples: Tensor, ids: Tensor, *, num_clusters: int, seed: int, all_reduce: AllReduce = alone
) -> tuple[int, npt.NDArray[np.float64]]:
    """Return the number of samples over all ranks, and the rows to fit on, the same on every rank.

    The rows are those of all ids in their order, or of `MAX_FIT_ROWS` of them, id 0 always among them. They
    are rounded to float32: a PCA summed over another number of ranks differs in its last bits, and these
    bits end here, but for about one value in a million.

    Raises:
        ValueError: on every rank alike, for NaN, wrong ids, or fewer different rows than clusters.
    """
    assert samples.ndim == 2, samples.shape
    assert ids.shape == (len(samples),), (ids.shape, samples.shape)
    if num_clusters < 1:
        raise ValueError(f"the number of clusters is {num_clusters}; it must be at least 1")
    bad = (~samples.isfinite()).any(dim=1).sum()
    counts = samples.new_tensor([len(samples), float(bad)], dtype=torch.float64)
    total, num_bad = (int(count) for count in all_reduce(counts))
    if num_bad:
        raise ValueError(f"{num_bad} of {total} samples to cluster hold NaN or infinity")
    if total < num_clusters:
        raise ValueError(f"{total} samples cannot form {num_clusters} clusters; ask for at most {total}")
    wanted = _draw_ids(total, seed).to(ids.device)
    slots = torch.searchsorted(wanted, ids.contiguous()).clamp(max=len(wanted) - 1)
    is_wanted = wanted[slots] == ids
    rows = torch.cat([samples, samples.new_ones(len(samples), 1)], dim=1)[is_wanted].float()
    gathered = rows.new_zeros(len(wanted), rows.shape[1]).index_add_(0, slots[is_wanted], rows)
    gathered = all_reduce(gathered)  # one rank writes a row, the others add zeros: exact
    holders = gathered[:, -1]
    if (holders != 1).any():
        wrong = int((holders != 1).nonzero()[0])
        raise ValueError(
            f"sample ids must be 0 to {total - 1}, each on one rank; id {int(wanted[wrong])} is there "
            f"{int(holders[wrong])} times"
        )
    found = gathered[:, :-1].double().cpu().numpy()
    few = len(np.unique(found[: 16 * num_clusters], axis=0)) < num_clusters  # cheap, and mostly enough
    if few and (different := len(np.unique(found, axis=0))) < num_clusters:
        raise ValueError(f"{num_clusters} clusters need as many different embeddings, found {different}")
    return total, found


def _draw_ids(total: int, seed: int) -> Tensor:
    if total <= MAX_FIT_ROWS:
        return torch.arange(total)
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed])))
    others = generator.choice(total - 1, MAX_FIT_ROWS - 1, replace=False) + 1
    return torch.from_numpy(np.sort(np.append(others, 0)))


def _fit(
    fit_fn: Callable[[np.random.RandomState], C],
    empty: C,
    seed: int,
    restarts: int,
    is_here: bool,
    all_reduce: AllReduce,
) -> list[C]:
    """Return `restarts` fits, each made on one rank and handed to all of them.

    The others wait meanwhile, so one fit must take less time than a process may be silent
    (`checkpoint.hang_minutes`); that is why each restart is a fit of its own.

    Args:
        empty: clusters of the right shapes and types, of zeros, on the samples' device.
        is_here: whether this rank is the one.

    Raises:
        ValueError: on every rank alike, for a cluster that collapsed.
    """
    if restarts < 1:
        raise ValueError(f"restarts is {restarts}; it must be at least 1")
    like, runs = empty.tensors(), []
    for restart in range(restarts):
        found = _fit_on_one_thread(fit_fn, (seed, restart)) if is_here else None
        values = [tensor.double().flatten().cpu() for tensor in (found or empty).tensors().values()]
        is_good = torch.tensor([float(found is not None)], dtype=torch.float64)
        # the other ranks add zeros, which is exact; + 0.0 because -0.0 would not survive that
        flat = all_reduce((torch.cat([is_good, *values]) + 0.0).to(next(iter(like.values())).device))
        if not flat[0]:
            raise ValueError(
                "a cluster of the mixture collapsed onto too few samples (its covariance is singular); "
                "ask for fewer clusters or components, or a larger reg_covar"
            )
        parts = zip(like.items(), flat[1:].split([tensor.numel() for tensor in like.values()]), strict=True)
        runs.append(empty.from_tensors({name: part.view(t.shape).to(t.dtype) for (name, t), part in parts}))
    return runs


def _fit_on_one_thread(fit_fn: Callable[[np.random.RandomState], C], entropy: tuple[int, ...]) -> C | None:
    """Return a fit; None where a covariance became singular."""
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(entropy)))
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # `is_converged` says it
        try:
            return fit_fn(random)
        except ValueError as error:
            if "ill-defined empirical covariance" not in str(error):
                raise
            return None


def _cholesky(covariances: Tensor) -> Tensor:
    factors, info = torch.linalg.cholesky_ex(covariances)
    if (info != 0).any():
        cluster = int((info != 0).nonzero()[0])
        raise ValueError(f"the covariance of cluster {cluster} is singular; the router's file is damaged")
    return factors


def _distances(samples: Tensor, centers: Tensor) -> Tensor:
    """Return squared distances (n, K), by differences: exact zeros, unlike |x|^2 - 2xc + |c|^2."""
    columns = [(samples.double() - center).square().sum(dim=1) for center in centers]
    return torch.stack(columns, dim=1)
