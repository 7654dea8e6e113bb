"""What embeddings say without a label: how many dimensions they use, and whose neighbours they keep.

effective rank = exp(-sum p_i log p_i),  p_i = lambda_i / sum lambda, of the covariance of unit vectors
mean cosine    = |mean of unit vectors|^2, the mean over all pairs: 1 is collapse
kept           = share of each query's k nearest in another embedding that are among its k nearest here
"""

from dataclasses import dataclass
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from selfmask_dist.evals.ranks import Alone, Ranks, raise_together
from selfmask_dist.evals.search import BankOptions, search


@dataclass(frozen=True)
class Shape:
    """How embeddings lie in their space.

    effective_rank: from 1 to the dimension. mean_cosine: from 0 to 1, where 1 is collapse. spectrum: (dim,)
    shares of the variance, largest first.
    """

    effective_rank: float
    mean_cosine: float
    spectrum: Tensor


def measure_shape(features: Tensor, ranks: Ranks | None = None) -> Shape:
    """Return the shape of all ranks' embeddings, of which features (n, dim) are this rank's. Collective if
    `ranks` is.

    Raises:
        ValueError: features that are not finite.
    """
    ranks = ranks or Alone()
    is_finite = bool(features.isfinite().all())
    raise_together(None if is_finite else "embeddings hold NaN or infinity", ranks, features.device)
    unit = F.normalize(features.double())
    dim = features.shape[1]
    sums = ranks.sum(torch.cat([unit.T @ unit, unit.sum(dim=0)[None], unit.new_full((1, dim), len(unit))]))
    count = sums[-1, 0]
    mean = sums[-2] / count
    spectrum = torch.linalg.eigvalsh(sums[:-2] / count - mean[:, None] * mean).clamp(min=0).flip(0)
    total = spectrum.sum()
    shares = spectrum / total if total > 0 else spectrum
    entropy = -(shares * shares.clamp(min=1e-300).log()).sum()
    return Shape(float(entropy.exp()), float(mean.square().sum()), shares.cpu())


def neighbours(bank: Tensor, queries: Tensor, *, k: int, **options: Unpack[BankOptions]) -> Tensor:
    """Return the ids (m, k) of the nearest neighbours, sorted by id, for `kept`. Collective if `ranks` is."""
    return search(bank, queries, k=k, **options)[1].sort(dim=1).values


def kept(here: Tensor, there: Tensor, ranks: Ranks | None = None) -> float:
    """Return the share of the neighbours `there` (m, k) that are among those `here`, over all ranks. Both are
    sorted, as `neighbours` has them. Collective if `ranks` is.
    """
    ranks = ranks or Alone()
    if not len(here):
        counts = torch.zeros(2, dtype=torch.int64, device=here.device)
    else:
        places = torch.searchsorted(here, there).clamp(max=here.shape[1] - 1)
        counts = torch.stack(
            [(here.gather(1, places) == there).sum(), torch.tensor(there.numel()).to(here.device)]
        )
    hits, total = ranks.sum(counts).tolist()
    return float(hits / total)
