"""Theta out of decoded bits, in place: theta = a * W * M for any number of parameters at once.

    layer = decoded(bits, weight)                    # once, as small as it can lie there
    rewrite([Change(theta, weight, layer, scales)])  # every time the mask is put on

Both ways give what `masking.core.materialize` gives: on a CPU vectorised passes (zeros may have another
sign), on a GPU one fused kernel for all parameters (`kernel`) where Triton is there. Knows nothing of names,
files or caches.
"""

from collections.abc import Sequence

import torch

from selfmask_dist.maskfile.layers import Change, is_fused


@torch.no_grad()
def rewrite(changes: Sequence[Change]) -> None:
    """Rewrite every theta in place. Layers must have been `decoded` for the devices they are on."""
    fused = [change for change in changes if is_fused(change.weight)]
    for change in changes:
        if not is_fused(change.weight):
            _rewrite(change)
    if fused:
        from selfmask_dist.maskfile.kernel import rewrite_fused  # imports triton

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
