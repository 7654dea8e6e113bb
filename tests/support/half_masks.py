"""A mask at random: about half of all weights of a network are off."""

import torch
from torch import nn

from selfmask_dist import Masks, attach


@torch.no_grad()
def mask_half(encoder: nn.Module) -> Masks:
    """Attach masks that keep about half of all weights, and write theta into the network."""
    masks = attach(encoder)
    draw = torch.Generator().manual_seed(0)
    for scores in masks.parameters():
        scores.copy_(torch.randn(scores.shape, generator=draw))
    masks.rewrite()
    off = masks.sparsity()
    assert 0.4 < sum(off.values()) / len(off) < 0.6, off
    return masks
