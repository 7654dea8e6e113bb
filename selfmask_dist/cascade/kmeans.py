"""k-means over ranks: k-means++ seeds, then Lloyd's iterations on summed (count, sum) per cluster.

What is drawn at random depends on the seed and the samples' global ids alone, so the seeds are the same under
any number of ranks: a seeded pool of at most 8,192 ids is drawn, each rank adds the rows that it holds to a
matrix of zeros, and every rank then chooses the seeds from the same summed pool. (Below 8,192 samples that is
k-means++ itself.) An empty cluster moves to the sample of the pool that is farthest from its centre.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from selfmask_dist.cascade.pca import AllReduce, alone, row_blocks

_POOL = 8192


@dataclass(frozen=True, eq=False)
class KMeans:
    """Centers (K, dim) float64 and `inertia`, the mean squared distance of a sample to its centre."""

    centers: Tensor
    inertia: float
    num_iterations: int

    def assign(self, samples: Tensor) -> Tensor:
        """The nearest centre (n,) int64 of each sample (n, dim)."""
        nearest = [
            _distances(block, self.centers).argmin(dim=1) for block in row_blocks(samples, samples.shape[1])
        ]
        return torch.cat(nearest)

    def probabilities(self, samples: Tensor) -> Tensor:
        """(n, K) float64, 1 for the nearest centre: k-means has no doubts."""
        return torch.nn.functional.one_hot(self.assign(samples), len(self.centers)).double()

    def reordered(self, order: Tensor) -> KMeans:
        """The same clusters, cluster i being what was cluster `order[i]`."""
        return replace(self, centers=self.centers[order])

    @property
    def means(self) -> Tensor:
        return self.centers

    def to(self, device: torch.device | str) -> KMeans:
        """The same on another device."""
        return replace(self, centers=self.centers.to(device))

    def tensors(self) -> dict[str, Tensor]:
        return {
            "centers": self.centers,
            "inertia": torch.tensor(self.inertia, dtype=torch.float64),
            "num_iterations": torch.tensor(self.num_iterations),
        }

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> KMeans:
        return KMeans(tensors["centers"], float(tensors["inertia"]), int(tensors["num_iterations"]))


def kmeans(
    samples: Tensor,
    ids: Tensor,
    *,
    num_clusters: int,
    seed: int | tuple[int, ...] = 0,
    restarts: int = 1,
    tolerance: float = 1e-4,
    max_iterations: int = 300,
    all_reduce: AllReduce = alone,
) -> KMeans:
    """The best of `restarts` runs by inertia. Collective if `all_reduce` is.

    Args:
        samples: (n, dim), this rank's part.
        ids: (n,) int64, their global ids: 0 ... total - 1, each on one rank.
        tolerance: stop when the centres moved by no more, in units of the mean variance of a dimension.

    Raises:
        ValueError: on every rank alike, for NaN, wrong ids, or fewer different samples than clusters.
    """
    if restarts < 1:
        raise ValueError(f"restarts is {restarts}; it must be at least 1")
    samples = samples.double()
    total, variance = check_samples(samples, ids, num_clusters, all_reduce)
    best: KMeans | None = None
    entropy = [seed] if isinstance(seed, int) else list(seed)
    for restart in range(restarts):
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([*entropy, restart])))
        pool = _draw_pool(samples, ids, total, generator, all_reduce)
        found = _lloyd(
            samples,
            _plus_plus(pool, num_clusters, generator),
            pool,
            tolerance=tolerance * variance,
            max_iterations=max_iterations,
            all_reduce=all_reduce,
        )
        # by more than rounding: the same optimum from two starts shall not be a draw that ranks decide
        if best is None or found.inertia < best.inertia * (1 - 1e-9):
            best = found
    assert best is not None
    return best


def check_samples(
    samples: Tensor, ids: Tensor, num_clusters: int, all_reduce: AllReduce
) -> tuple[int, float]:
    """Number of samples over all ranks and mean variance of a dimension; raises on every rank alike."""
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
    mean = all_reduce(samples.sum(dim=0)) / total
    return total, float((all_reduce((samples - mean).square().sum(dim=0)) / total).mean())


def _draw_pool(
    samples: Tensor, ids: Tensor, total: int, generator: np.random.Generator, all_reduce: AllReduce
) -> Tensor:
    """(pool, dim): the samples with some random ids, in the order of their ids, the same on every rank."""
    chosen = np.sort(generator.choice(total, min(total, _POOL), replace=False))
    wanted = torch.from_numpy(chosen).to(ids.device)
    slots = torch.searchsorted(wanted, ids.contiguous()).clamp(max=len(wanted) - 1)
    is_wanted = wanted[slots] == ids
    rows = torch.cat([samples, samples.new_ones(len(samples), 1)], dim=1)[is_wanted]
    pool = samples.new_zeros(len(wanted), samples.shape[1] + 1).index_add_(0, slots[is_wanted], rows)
    pool = all_reduce(pool)  # one rank writes a row, the others add zeros: exact
    holders = pool[:, -1]
    if (holders != 1).any():
        wrong = int((holders != 1).nonzero()[0])
        raise ValueError(
            f"sample ids must be 0 to {total - 1}, each on one rank; id {int(wanted[wrong])} is there "
            f"{int(holders[wrong])} times"
        )
    return pool[:, :-1]


def _plus_plus(pool: Tensor, num_clusters: int, generator: np.random.Generator) -> Tensor:
    """Greedy k-means++: of some candidates drawn by squared distance, the one that leaves the least of it."""
    trials = 2 + int(math.log(num_clusters))
    seeds = [int(generator.integers(len(pool)))]
    closest = _distances(pool, pool[seeds]).squeeze(1)
    while len(seeds) < num_clusters:
        reach = closest.cumsum(dim=0)
        if reach[-1] <= 0:
            raise ValueError(f"{num_clusters} clusters need as many different embeddings, found {len(seeds)}")
        draws = torch.from_numpy(generator.random(trials)).to(pool.device) * reach[-1]
        candidates = torch.searchsorted(reach, draws, right=True).clamp(max=len(pool) - 1)
        after = torch.minimum(closest, _distances(pool, pool[candidates]).T)
        best = int(after.sum(dim=1).argmin())
        seeds.append(int(candidates[best]))
        closest = after[best]
    return pool[seeds]


def _lloyd(
    samples: Tensor,
    centers: Tensor,
    pool: Tensor,
    *,
    tolerance: float,
    max_iterations: int,
    all_reduce: AllReduce,
) -> KMeans:
    iteration = 0
    while True:
        sums, counts, inertia = _cluster_sums(samples, centers, all_reduce)
        if iteration == max_iterations:
            return KMeans(centers, inertia, iteration)
        moved = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), centers)
        empty = (counts == 0).nonzero().flatten()
        if len(empty):
            farthest = _distances(pool, centers).amin(dim=1).sort(descending=True, stable=True).indices
            moved[empty] = pool[farthest[: len(empty)]]
        iteration += 1
        is_still = (moved - centers).square().sum() <= tolerance
        centers = moved
        if is_still:
            return KMeans(centers, _cluster_sums(samples, centers, all_reduce)[2], iteration)


def _cluster_sums(samples: Tensor, centers: Tensor, all_reduce: AllReduce) -> tuple[Tensor, Tensor, float]:
    """Sums (K, dim) and counts (K,) of each centre's samples, and the mean squared distance."""
    num_clusters, dim = centers.shape
    stats = centers.new_zeros(num_clusters, dim + 2)
    for block in row_blocks(samples, dim):
        distance, nearest = _distances(block, centers).min(dim=1)
        rows = torch.cat([block, torch.ones_like(distance)[:, None], distance[:, None]], dim=1)
        # a product, not index_add_: that one sums in any order on a GPU
        stats += torch.nn.functional.one_hot(nearest, num_clusters).double().T @ rows
    stats = all_reduce(stats)
    counts = stats[:, dim]
    return stats[:, :dim], counts, float(stats[:, dim + 1].sum() / counts.sum())


def _distances(samples: Tensor, centers: Tensor) -> Tensor:
    """Squared distances (n, K), by differences: exact zeros, unlike |x|^2 - 2xc + |c|^2."""
    columns = [(samples.double() - center).square().sum(dim=1) for center in centers]
    return torch.stack(columns, dim=1)
