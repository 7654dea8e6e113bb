"""Theta rewritten by vectorised passes, and by the kernel where that is to be had."""

from collections.abc import Sequence

import torch

from selfmask_dist.rewrite.layer import Change, is_fused


@torch.no_grad()
def rewrite(changes: Sequence[Change]) -> None:
    """Rewrite every theta in place. Layers must have been `decoded` for the devices they are on."""
    fused = [change for change in changes if is_fused(change.weight)]
    for change in changes:
        if not is_fused(change.weight):
            _rewrite(change)
    if fused:
        from selfmask_dist.rewrite.kernel import rewrite_fused  # imports triton

        rewrite_fused(fused)


def _rewrite(change: Change) -> None:
    if not change.theta.is_contiguous():  # channels_last, say
        theta = torch.empty_like(change.theta, memory_format=torch.contiguous_format)
        _rewrite(Change(theta, change.weight, change.layer, change.scales))
        change.theta.copy_(theta)
        return
    theta, weight, layer = change.theta, change.weight, change.layer
    parts = len(change.scales)
    for part, source, scale in zip(theta.chunk(parts), weight.chunk(parts), change.scales, strict=True):
        torch.mul(source, scale, out=part)
    flat = theta.view(-1)
    if layer.packed is not None:
        bits = (layer.packed[:, None] >> torch.arange(7, -1, -1, device=theta.device)) & 1
        flat.mul_(bits.view(-1)[: flat.numel()].to(flat.dtype))
    elif layer.places is not None and layer.rare:
        places = layer.places.long()
        values = flat[places]
        flat.zero_()
        flat[places] = values
    elif layer.places is not None:
        flat.index_fill_(0, layer.places.long(), 0.0)
