"""Encoder and loader to embeddings, in the order of the source, on every rank.

Knows nothing of masks, objectives or what the embeddings are for.
"""

from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from selfmask_dist.data import Batch
from selfmask_dist.parallel import World


@dataclass(frozen=True)
class Embeddings:
    """Features (n, dim) float32 and labels (n,) int64 on the CPU, row i for sample i of the source."""

    features: Tensor
    labels: Tensor


@torch.no_grad()
def embed(encoder: nn.Module, loader: Iterable[Batch], *, num_samples: int, world: World) -> Embeddings:
    """Embed every sample of a loader, the encoder in eval mode. Collective: every rank must call.

    Args:
        encoder: images (n, 3, H, W) -> (n, dim).
        loader: yields this rank's part; padding has weight 0.
        num_samples: of the whole source, over all ranks.

    Raises:
        ValueError: an embedding is not finite.
    """
    features: Tensor | None = None
    labels = torch.zeros(num_samples, dtype=torch.int64)
    with eval_mode(encoder):
        for batch in loader:
            rows = batch.weights > 0
            output = encoder(batch.views[0].to(world.device)).float().cpu()
            if features is None:
                features = torch.zeros(num_samples, output.shape[1])
            features[batch.ids[rows]] = output[rows]
            labels[batch.ids[rows]] = batch.labels[rows]
    assert features is not None, "every rank gets at least one batch, if only of padding"
    # each row was written by one rank and is zero elsewhere, so the sum is exact
    features = world.sum(features.to(world.device)).cpu()
    labels = world.sum(labels.to(world.device)).cpu()
    if not features.isfinite().all():
        bad = (~features.isfinite().all(dim=1)).nonzero().flatten()
        raise ValueError(
            f"embeddings of {len(bad)} samples are not finite, the first is sample {int(bad[0])}"
        )
    return Embeddings(features, labels)


@contextmanager
def eval_mode(module: nn.Module) -> Any:
    """Put `module` in eval mode and put every submodule's own mode back after."""
    modes = {name: child.training for name, child in module.named_modules()}
    module.eval()
    try:
        yield
    finally:
        for name, child in module.named_modules():
            child.training = modes[name]
