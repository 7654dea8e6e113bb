"""Encoder and loader to embeddings: each rank keeps those of its own samples.

Knows nothing of masks, objectives or what the embeddings are for.
"""

from collections.abc import Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from selfmask_dist.data import Batch
from selfmask_dist.evals.embeddings import Embeddings
from selfmask_dist.parallel import World


class NonFiniteEmbeddingsError(ValueError):
    """Embeddings are not finite: the encoder, or an image, is broken."""


@torch.no_grad()
def embed(encoder: nn.Module, loader: Iterable[Batch], *, world: World) -> Embeddings:
    """Embed the samples of this rank's loader, the encoder in eval mode. Collective: every rank must call.

    Args:
        encoder: images (n, 3, H, W) -> (n, dim).
        loader: yields this rank's part, one batch or more; padding has weight 0.

    Raises:
        NonFiniteEmbeddingsError: on every rank, where an embedding on any of them is not finite.
    """
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    with eval_mode(encoder):
        for batch in loader:
            rows = batch.weights > 0
            output = encoder(batch.views[0].to(world.device)).float()
            kept = rows.to(world.device)
            parts.append(
                (output[kept], batch.labels[rows].to(world.device), batch.ids[rows].to(world.device))
            )
    assert parts, "every rank gets at least one batch, if only of padding"
    features, labels, ids = (torch.cat(part) for part in zip(*parts, strict=True))
    order = ids.argsort()
    found = Embeddings(features[order], labels[order], ids[order])
    _check_finite(found, world)
    return found


def _check_finite(found: Embeddings, world: World) -> None:
    bad = found.ids[(~found.features.isfinite()).any(dim=1)]
    counts = torch.zeros(2, world.size, dtype=torch.int64, device=world.device)
    counts[0, world.rank] = len(bad)
    counts[1, world.rank] = bad[0] if len(bad) else 0
    numbers, firsts = world.sum(counts)
    if numbers.any():
        raise NonFiniteEmbeddingsError(
            f"embeddings of {int(numbers.sum())} samples are not finite, the first is sample "
            f"{int(firsts[numbers > 0].min())}"
        )


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
