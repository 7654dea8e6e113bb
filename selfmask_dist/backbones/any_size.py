"""Encoders for images of several sizes at once, as multi-crop training has them.

Convolutional networks take any size by themselves. Vision transformers hold position embeddings for one grid
of patches; for another grid they are resampled (bicubic, antialiased) in the forward, as timm does for its
own (`dynamic_img_size`), and images of the first size are computed as before. No weight changes.
"""

from collections.abc import Iterable
from typing import Any

from timm.layers import Format
from torch import nn

from selfmask_dist.backbones.pooling import change_class
from selfmask_dist.backbones.structure import run_on_meta


def accept_sizes(encoder: nn.Module, sizes: Iterable[int], *, name: str) -> None:
    """Make `encoder` take square images of all these sizes, in place, before it is sharded.

    Raises:
        ValueError: it cannot; the message says which size.
    """
    _open_up(encoder)
    for size in sorted(set(sizes)):
        try:
            run_on_meta(encoder, (2, 3, size, size))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"{name} cannot take crops of {size} pixels: {error}. Choose crops.local_size and "
                "crops.global_size that it can (for ViTs, multiples of the patch), or crops.local_count=0"
            ) from error


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
