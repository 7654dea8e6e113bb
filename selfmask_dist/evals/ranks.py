"""What every evaluation asks of its embeddings and of the processes that share them, and the sums all make.

Knows no process groups: `parallel.World` is such `Ranks`, and `Alone` is one process without others.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Ranks(Protocol):
    """This process among those that share the samples; `parallel.World` is one."""

    @property
    def rank(self) -> int:
        """The number of this process, from 0."""
        ...

    @property
    def size(self) -> int:
        """The number of processes."""
        ...

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over ranks; it may be in place."""
        ...

    def all_to_all(self, tensor: Tensor) -> Tensor:
        """Send row r of (size, ...) to rank r, and return (size, ...) whose row r is from rank r."""
        ...


class Alone:
    """A process without others: what would go over the network comes straight back."""

    rank, size = 0, 1

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the tensor as it is."""
        return tensor

    def all_to_all(self, tensor: Tensor) -> Tensor:
        """Return the tensor as it is."""
        return tensor


def raise_together(complaint: str | None, ranks: Ranks, device: torch.device) -> None:
    """Raise ValueError on every rank where any has a complaint, so that none waits for one that raised.

    Collective: every rank must call.
    """
    complaints = torch.zeros(ranks.size, dtype=torch.int64, device=device)
    complaints[ranks.rank] = complaint is not None
    complaints = ranks.sum(complaints)
    if complaint is not None:
        raise ValueError(complaint)
    if complaints.any():
        raise ValueError(f"rank {int(complaints.argmax())} cannot go on; its own error says why")


def largest(value: int, ranks: Ranks, device: torch.device) -> int:
    """Return the largest of all ranks' values, which are 0 or more. Collective."""
    values = torch.zeros(ranks.size, dtype=torch.int64, device=device)
    values[ranks.rank] = value
    return int(ranks.sum(values).max())


def gather_labels(labels: Tensor, ids: Tensor, ranks: Ranks) -> Tensor:
    """Return the labels of all ranks' samples at their ids, -1 where no rank has that id. Collective.

    It takes 8 bytes for each sample of all ranks.
    """
    length = largest(int(ids.max()) + 1 if len(ids) else 0, ranks, ids.device)
    table = torch.zeros(length, dtype=torch.int64, device=ids.device)
    table[ids] = labels + 1
    return ranks.sum(table) - 1


def share(hits: Tensor, ranks: Ranks) -> float:
    """Return the share of true entries among those of all ranks. Collective."""
    counts = ranks.sum(torch.stack([hits.sum(), hits.sum().new_full((), hits.numel())]))
    return float(counts[0].double() / counts[1])


# ---- a mistake is named before it becomes an accuracy


def check_features(name: str, features: Tensor) -> None:
    """Raise ValueError unless `features` is a non-empty (samples, dim) matrix of finite numbers."""
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(
            f"{name} must be a non-empty matrix (samples, dim), got shape {tuple(features.shape)}"
        )
    if not features.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {features.dtype}")
    # a sum takes a fiftieth of the time, and NaN and infinity show in it
    if features.sum(dtype=torch.float32).isfinite():
        return
    rows = (~torch.isfinite(features)).any(dim=1).nonzero().flatten()
    if len(rows):
        raise ValueError(
            f"{name}: {len(rows)} of {len(features)} rows hold NaN or infinity, the first at {int(rows[0])}; "
            "look at the images or the training that made them"
        )


def check_labels(name: str, labels: Tensor, num_samples: int, num_classes: int | None = None) -> None:
    """Raise ValueError unless `labels` holds one class id in [0, num_classes) for each sample."""
    if labels.shape != (num_samples,):
        raise ValueError(
            f"{name} must have shape ({num_samples},) to match the features, got {tuple(labels.shape)}"
        )
    if labels.is_floating_point():
        raise ValueError(f"{name} must be integers, got {labels.dtype}")
    low, high = int(labels.min()), int(labels.max())
    if low < 0:
        raise ValueError(f"{name} hold {low}: leave out the samples without a label")
    if num_classes is not None and high >= num_classes:
        raise ValueError(f"{name} hold {high}, but num_classes is {num_classes}")
