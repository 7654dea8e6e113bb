"""The public API in one place: masks in anybody's training loop, and mask files on anybody's model."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from selfmask_dist.maskfile.file import read_mask_file, write_mask_file
from selfmask_dist.maskfile.fit import (
    Gathered,
    apply_mask,
    gather,
    one_by_one,
    warn_of_verdict,
    weights_of,
    without_bits,
)
from selfmask_dist.maskfile.mask import MaskFile, MaskFileError
from selfmask_dist.masking import AttachedMasks, detach

__all__ = ["Masks", "apply_masks", "attach", "detach", "save_masks"]


class Masks(AttachedMasks):
    """Masks on a model, that can save themselves. Made by `attach`."""

    def save(
        self,
        path: str | Path,
        *,
        backbone: str = "",
        backbone_fingerprint: str = "",
        preprocessing: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        against_weights: bool = False,
    ) -> int:
        """Write these masks to a mask file; see `save_masks`."""
        return save_masks(
            self,
            path,
            backbone=backbone,
            backbone_fingerprint=backbone_fingerprint,
            preprocessing=preprocessing,
            metrics=metrics,
            against_weights=against_weights,
            with_rounded=True,
        )


attach = Masks.attach


def save_masks(
    masks: AttachedMasks,
    path: str | Path,
    *,
    backbone: str = "",
    backbone_fingerprint: str = "",
    preprocessing: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
    against_weights: bool = False,
    is_writer: bool = True,
    with_rounded: bool = False,
    verdict: str = "",
) -> int:
    """Write masks to a mask file (`maskfile.file`); returns the number of bytes.

    Collective where the masks are sharded: every rank must call, one of them as writer. Parameters are
    gathered one after the other; the writer keeps each one's coded bits, the others keep nothing.

    Args:
        backbone, backbone_fingerprint, preprocessing, metrics: kept in the file's header for its readers. The
            weights under the mask are fingerprinted in any case.
        against_weights: code the bits by how large the weights under them are: a smaller file, that is read
            only together with the backbone.
        is_writer: False only takes part in gathering the masks, and returns 0.
        with_rounded: add the fingerprints of the weights in half precision, with which a model in float16 or
            bfloat16 is told from a wrong one.
        verdict: what speaks against the mask; readers warn with it.
    """
    mask = without_bits(masks, with_rounded=with_rounded, is_kept=is_writer)
    gathered = gather(masks, is_kept=is_writer, with_weights=against_weights)
    known: dict[str, Tensor] = {}

    def parameters() -> Iterator[Gathered]:
        for parameter in gathered:
            known.clear()
            if parameter.weight is not None:
                known[parameter.name] = parameter.weight
            yield parameter

    try:
        if not is_writer:
            return 0
        file = MaskFile(
            masks={"default": mask},
            backbone=backbone,
            backbone_fingerprint=backbone_fingerprint,
            preprocessing=dict(preprocessing or {}),
            metrics=dict(metrics or {}),
            verdict=verdict,
        )
        return write_mask_file(
            path,
            file,
            weights=known.__getitem__ if against_weights else None,
            parts={"default": one_by_one(mask, parameters())},
        )
    finally:
        for _ in gathered:  # the other ranks wait for this one, whatever went wrong here
            pass


def apply_masks(model: nn.Module, path: str | Path, *, name: str | None = None) -> MaskFile:
    """Apply a mask file to a model that holds the frozen weights, in place; returns what the file holds.

    Args:
        model: a timm or open_clip model, or any module that holds the masked parameters; in half precision
            too, where the file tells such weights (those that `Masks.save` wrote do).
        name: which mask, where the file holds several.

    Raises:
        MaskFileError: the file is damaged, or does not fit the model's architecture or weights, or the model
            carries masks already.
        TypeError: `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"apply_masks takes the model and then the file, and the model is a {type(model).__name__}"
        )
    file = read_mask_file(path, weights=weights_of(model))
    if name is None and len(file.masks) > 1:
        raise MaskFileError(f"{path} holds several masks; name one of {sorted(file.masks)}")
    if name is not None and name not in file.masks:
        raise MaskFileError(f"{path} holds no mask {name!r}; it has {sorted(file.masks)}")
    name = name or next(iter(file.masks))
    warn_of_verdict(file, path)
    apply_mask(model, file.masks[name], what=f"mask {name!r} of {path}")
    return file
