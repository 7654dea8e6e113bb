"""transformers' `preprocessor_config.json` as a `Preprocessing`.

    {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "do_center_crop": true}
    -> image_size 224, crop_pct 224 / 256, crop_mode center

Knows the entries of image processors; nothing of models.
"""

import logging
from typing import Any

from selfmask_dist.common.preprocessing import Preprocessing

_LOG = logging.getLogger(__name__)
_RESAMPLING = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # Pillow's numbers
_BYTE = 1 / 255
# ImageNet's, for a random network whose folder says nothing
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def read_preprocessing(
    source: str, name: str, *, model_size: int | None, image_size: int | None, may_be_missing: bool
) -> Preprocessing:
    """Return how a model wants its images, by its own file.

    Args:
        source: a folder or a name on the hub.
        model_size: side of the images that the model's configuration names; None where it names none.
        image_size: the side that is wanted; None: as in the file.
        may_be_missing: take ImageNet's normalisation and the model's size where there is no file, and say so
            in the log.

    Raises:
        ValueError: there is no such file, or it asks for what is not supported.
    """
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(source)
    except Exception as error:
        if may_be_missing:
            _LOG.warning("%s has no preprocessor_config.json: images are normalised as ImageNet's", name)
            size = image_size or model_size or 224
            return Preprocessing(size, _MEAN, _STD, crop_pct=1.0)
        raise ValueError(
            f"transformers' {name} does not say how it wants its images (preprocessor_config.json): "
            f"{str(error)[:200]}\nSet backbone.mean, backbone.std, backbone.image_size and backbone.crop_pct"
        ) from error
    return from_entries(processor.to_dict(), name, model_size=model_size, image_size=image_size)


def from_entries(
    entries: dict[str, Any], name: str, *, model_size: int | None = None, image_size: int | None = None
) -> Preprocessing:
    """Return the preprocessing that an image processor's entries describe.

    The share that a crop keeps stays where `image_size` asks for another side.

    Raises:
        ValueError: images are not scaled to whole squares, or an unknown resampling.
    """
    side, crop_pct, mode = _geometry(entries, name, model_size)
    resample = entries.get("resample", 3)
    if not isinstance(resample, int) or not 0 <= resample < len(_RESAMPLING):
        raise ValueError(f"transformers' {name}: resample {resample!r} is not one of Pillow's, 0 to 5")
    scale = entries.get("rescale_factor", _BYTE) if entries.get("do_rescale", True) else 1.0
    mean, std = entries.get("image_mean"), entries.get("image_std")
    if not entries.get("do_normalize", True) or mean is None or std is None:
        mean, std = (0.0,) * 3, (1.0,) * 3
    factor = 1.0 if abs(scale - _BYTE) < 1e-9 else _BYTE / scale  # (v * scale - m) / s, for v / 255
    return Preprocessing(
        image_size=image_size or side,
        mean=tuple(m * factor for m in mean),
        std=tuple(s * factor for s in std),
        interpolation=_RESAMPLING[resample],
        crop_pct=crop_pct,
        crop_mode=mode,
    )


def _geometry(entries: dict[str, Any], name: str, model_size: int | None) -> tuple[int, float, str]:
    """Return the side of the input, the share of the resized image that it is, and how that is resized."""
    if "max_num_patches" in entries:  # SigLIP 2 keeps the aspect; squares are the same number of patches
        patch = int(entries.get("patch_size", 16))
        return model_size or round(entries["max_num_patches"] ** 0.5) * patch, 1.0, "squash"
    size, crop = _sides(entries.get("size")), _sides(entries.get("crop_size"))
    if not entries.get("do_resize", True):
        size = None
    if not entries.get("do_center_crop", False):
        crop = None
    target = crop or size
    if target is None:
        if model_size is None:
            raise ValueError(f"transformers' {name} names no size of images; set backbone.image_size")
        return model_size, 1.0, "center"
    if target[0] != target[1] or (size is not None and size[0] != size[1]):
        raise ValueError(f"transformers' {name} wants images of {target}; only squares are supported")
    is_short = isinstance(entries.get("size"), dict) and "shortest_edge" in entries["size"]
    if size is not None and crop is not None:
        return crop[0], crop[0] / size[0], "center" if is_short else "squash"
    pct = entries.get("crop_pct")
    if (
        pct is not None and size is not None and is_short
    ):  # ConvNeXt: below 384 pixels a crop, above the whole
        return (size[0], float(pct), "center") if size[0] < 384 else (size[0], 1.0, "squash")
    return target[0], 1.0, "center" if is_short else "squash"


def _sides(value: Any) -> tuple[int, int] | None:
    """Return height and width of `{"height": ..., "width": ...}`, `{"shortest_edge": ...}` or a number."""
    if value is None:
        return None
    if isinstance(value, int):
        return value, value
    if isinstance(value, dict):
        if "height" in value and "width" in value:
            return int(value["height"]), int(value["width"])
        if "shortest_edge" in value:
            return int(value["shortest_edge"]), int(value["shortest_edge"])
    return None
