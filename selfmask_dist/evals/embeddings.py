"""Embeddings of samples that ranks share: what is embedded, stored, searched and probed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Embeddings:
    """This rank's samples.

    features: (n, dim) of a float type. labels: (n,) int64, -1 where a sample has none. ids: (n,) int64,
    ascending: places in the source, each on one rank.
    """

    features: Tensor
    labels: Tensor
    ids: Tensor

    @staticmethod
    def of(features: Tensor, labels: Tensor) -> Embeddings:
        """Return the embeddings of one process alone, numbered from 0."""
        return Embeddings(features, labels, torch.arange(len(features), device=features.device))

    def to(self, device: torch.device | str) -> Embeddings:
        """Return the same samples on a device."""
        return Embeddings(self.features.to(device), self.labels.to(device), self.ids.to(device))

    def where(self, chosen: Tensor) -> Embeddings:
        """Return the samples at which `chosen`, bool (n,), is true."""
        return Embeddings(self.features[chosen], self.labels[chosen], self.ids[chosen])


def mean_embedding(members: Sequence[Tensor]) -> Tensor:
    """Return the mean of the unit vectors of embeddings (n, dim) of the same samples.

    Raises:
        ValueError: they differ in shape.
    """
    shapes = {tuple(member.shape) for member in members}
    if len(shapes) != 1:
        raise ValueError(f"an ensemble is of embeddings of one shape, got {sorted(shapes)}")
    return torch.stack([F.normalize(member.float()) for member in members]).mean(dim=0)
