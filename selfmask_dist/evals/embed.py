"""Encoder and loader to embeddings: each rank keeps those of its own samples.

Knows nothing of masks, objectives or what the embeddings are for.
"""

from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from selfmask_dist.data import Batch
from selfmask_dist.evals.embeddings import Embeddings
from selfmask_dist.parallel import World

Precision = Literal["float32", "bf16"]


class NonFiniteEmbeddingsError(ValueError):
    """Embeddings are not finite: the encoder, or an image, is broken."""


def in_precision(
    encode_fn: Callable[[Tensor], Tensor], precision: Precision, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """Return `encode_fn` in a precision (`eval.precision`) on a device; what it returns is float32."""
    if precision == "float32":
        return encode_fn

    def encode(images: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return encode_fn(images).float()

    return encode


def made_in(precision: Precision) -> dict[str, str]:
    """Return what a store's provenance says of it: of float32 nothing, as older stores."""
    return {} if precision == "float32" else {"precision": precision}


@torch.no_grad()
def embed(
    encoder: nn.Module, loader: Iterable[Batch], *, world: World, precision: Precision = "float32"
) -> Embeddings:
    """Embed the samples of this rank's loader, the encoder in eval mode. Collective: every rank must call.

    Args:
        encoder: images (n, 3, H, W) -> (n, dim).
        loader: yields this rank's part, one batch or more; padding has weight 0.
        precision: of the encoder.

    Raises:
        NonFiniteEmbeddingsError: on every rank, where an embedding on any of them is not finite.
    """
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    encode_fn = in_precision(encoder, precision, world.device)
    with eval_mode(encoder):
        for batch in loader:
            rows = batch.weights > 0
            output = encode_fn(batch.views[0].to(world.device)).float()
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


@dataclass(frozen=True)
class EmbeddedViews:
    """Features of several views of this rank's samples, ascending.

    means: (n, dim), of each sample's views. kept: (m, views, dim), all of some samples'. broken: ids of
    samples that could not be read, whose rows mean nothing.
    """

    means: Tensor
    kept: Tensor
    broken: Tensor


@torch.no_grad()
def embed_views(
    encoder: nn.Module,
    loader: Iterable[Batch],
    *,
    world: World,
    flip: bool,
    keep: Tensor,
    on_batch: Callable[[], None] = lambda: None,
) -> EmbeddedViews:
    """Embed every view of the samples of this rank's loader, the encoder in eval mode. Collective.

    Args:
        flip: embed the mirror image of the first view as well; both then count double in the mean.
        keep: ids, ascending, of this rank's samples whose features are wanted one by one: what is held in
            memory is that, and a mean for each sample.
        on_batch: called after each batch.

    Raises:
        ValueError: on every rank, where an embedding on any of them is not finite.
    """
    means: list[Tensor] = []
    kept: list[Tensor] = []
    ids: list[Tensor] = []
    broken: list[int] = []
    with eval_mode(encoder):
        for batch in loader:
            broken += [failure.id for failure in batch.failures]
            is_padding = batch.weights == 0
            is_padding[[i in broken for i in batch.ids.tolist()]] = False
            views = batch.to(world.device).views
            if flip:
                views = (views[0], views[0].flip(-1), *views[1:])
            features = torch.stack([encoder(view).float() for view in views], dim=1)[~is_padding]
            counts = features.new_ones(len(views))
            counts[: 2 if flip else 1] = 2
            means.append(torch.einsum("nvd,v->nd", features, counts / counts.sum()))
            rows = batch.ids[~is_padding]
            kept.append(features[torch.isin(rows, keep).to(features.device)])
            ids.append(rows)
            on_batch()
    found = torch.cat(means)
    _check_finite(Embeddings(found, torch.cat(ids), torch.cat(ids)), world)
    return EmbeddedViews(found, torch.cat(kept), torch.tensor(broken, dtype=torch.int64))


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
