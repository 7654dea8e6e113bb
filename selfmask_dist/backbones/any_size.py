"""Encoders for images of several sizes at once, as multi-crop training has them.

Convolutional networks take any size by themselves. Vision transformers hold position embeddings for one grid
of patches; for another grid they are resampled (bicubic, antialiased) in the forward, as timm does for its
own (`dynamic_img_size`), and images of the first size are computed as before. No weight changes.
"""

from collections.abc import Iterable
from typing import Any

import torch
from timm.layers import Format
from torch import nn

from selfmask_dist.backbones.pooling import change_class
from selfmask_dist.backbones.structure import run_on_meta


def accept_sizes(encoder: nn.Module, sizes: Iterable[int], *, name: str, channels: int = 3) -> None:
    """Make `encoder` take square images of all these sizes, in place, before it is sharded.

    Raises:
        ValueError: it cannot; the message says which size.
    """
    _open_up(encoder)
    for size in sorted(set(sizes)):
        try:
            _try(encoder, (2, channels, size, size))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"{name} cannot take crops of {size} pixels: {error}. Choose crops.local_size and "
                "crops.global_size that it can (for ViTs, multiples of the patch; with windows, multiples of "
                f"those too), or crops.local_count=0{_hint(encoder)}"
            ) from error


@torch.no_grad()
def _try(encoder: nn.Module, shape: tuple[int, ...]) -> None:
    """Run the encoder on images of that shape, without storage where it looks at no value on its way."""
    try:
        run_on_meta(encoder, shape)
    except RuntimeError as error:
        if "meta tensors" not in str(error):
            raise
        encoder(torch.zeros(shape, device="cpu"))  # SigLIP 2 asks which patches are seen


def _hint(encoder: nn.Module) -> str:
    rope = getattr(encoder, "rope", None)
    if isinstance(rope, nn.Module) and getattr(rope, "feat_shape", None) is not None:
        return (
            ". Its rotary positions were made for one size: backbone.kwargs={dynamic_img_size: true} makes "
            "them for any"
        )
    return ""


def _open_up(module: Any) -> None:
    if isinstance(getattr(module, "trunk", None), nn.Module):  # open_clip's tower around a timm model
        _open_up(module.trunk)
    elif type(module).__module__ == "open_clip.transformer":
        from selfmask_dist.backbones.from_open_clip import AnySizeVisionTransformer

        change_class(module, AnySizeVisionTransformer)
    elif hasattr(module, "dynamic_img_size") and not module.dynamic_img_size:
        # what timm's constructor does for dynamic_img_size=True
        module.dynamic_img_size = True
        module.patch_embed.strict_img_size = False
        module.patch_embed.flatten = False
        module.patch_embed.output_fmt = Format.NHWC
