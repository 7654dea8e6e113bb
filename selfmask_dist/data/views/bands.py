"""Pictures of any number of channels: arrays in, views out, with the depth that they have.

    .npy member or multi-band TIFF -> (height, width, channels) uint8, uint16 or float32 -> float32

uint8 is divided by 255, uint16 by 65,535, float32 is taken as it is. Then a view is cropped, resized and
normalised as `single` does it, by torch in place of PIL, which has no such pictures. Knows no sources.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from selfmask_dist.common.optional import require
from selfmask_dist.common.pictures import ShapeError, check_size
from selfmask_dist.common.preprocessing import MAX_CHANNELS, Preprocessing

Bands = npt.NDArray[Any]
NPY_START = b"\x93NUMPY"
RANGES = {"uint8": 255.0, "uint16": 65535.0, "float32": 1.0}


def read_npy(data: bytes) -> Bands:
    """Return the array (height, width, channels) of a .npy file; (height, width) has one channel.

    Raises:
        ValueError: it is damaged, of another type or shape, or holds values that are not finite.
    """
    try:
        found: Bands = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # numpy raises what it likes over damaged files
        raise ValueError(f"cannot be read as a .npy file ({type(error).__name__}: {error})") from error
    return checked(found)


def read_tiff(data: bytes) -> Bands:
    """Return the array (height, width, channels) of a TIFF's first picture, whatever its bands are.

    Raises:
        ValueError: it cannot be read, or as `read_npy`.
        MissingLibraryError: tifffile is not installed.
    """
    require("tifffile", "tifffile", extra="bands", needed_by="reading TIFF files of several bands")
    import tifffile

    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            series = file.series[0]
            found, axes = series.asarray(), str(series.axes)
    except Exception as error:  # tifffile raises what it likes over damaged files
        raise ValueError(f"cannot be read as a TIFF ({type(error).__name__}: {error})") from error
    if found.ndim == 3 and axes[-2:] == "YX":  # a plane for each band
        found = found.transpose(1, 2, 0)
    return checked(np.ascontiguousarray(found))


def checked(found: Bands) -> Bands:
    """Return an array as (height, width, channels).

    Raises:
        ValueError: it is of another shape or type, or holds values that are not finite.
    """
    if found.ndim == 2:
        found = found[:, :, None]
    if found.ndim != 3 or not 1 <= found.shape[2] <= MAX_CHANNELS or 0 in found.shape:
        raise ValueError(
            f"is an array of {found.shape}; it must be (height, width, channels), of 1 to {MAX_CHANNELS} "
            "channels"
        )
    if found.dtype.name not in RANGES:
        raise ValueError(f"is of type {found.dtype}; it must be one of {', '.join(RANGES)}")
    check_size((found.shape[1], found.shape[0]))
    if found.dtype.kind == "f" and not np.isfinite(found).all():
        raise ValueError("holds values that are not finite")
    return found


def scaled(found: Bands) -> npt.NDArray[np.float32]:
    """Return values as float32, integers divided by the largest of their type."""
    return found.astype(np.float32) / np.float32(RANGES[found.dtype.name])


def as_bands(image: Image.Image | Bands, channels: int) -> Bands:
    """Return a decoded picture as an array of so many channels.

    An RGB picture is of three, or of one where it is grey.

    Raises:
        ShapeError: it has another number.
    """
    if isinstance(image, Image.Image):
        pixels = np.asarray(image)
        is_grey = bool((pixels == pixels[:, :, :1]).all())
        image = pixels[:, :, :1] if channels == 1 and is_grey else pixels
    if image.shape[2] != channels:
        raise ShapeError(
            f"has {image.shape[2]} channels, and data.channels is {channels} (backbone.mean has as many)"
        )
    return image


def view_of(
    image: Image.Image | Bands,
    pre: Preprocessing,
    *,
    box: tuple[int, int, int, int] | None,
    resized: tuple[int, int],
    start: tuple[int, int] = (0, 0),
    flip: bool = False,
    size: int | None = None,
) -> Tensor:
    """Return a normalised view (channels, size, size), float32.

    Args:
        box: what is cut out first, (left, top, right, bottom); None: the whole picture.
        resized: width and height that this is resized to.
        start: left and top of the view in the resized picture; outside of it there are zeros.
        flip: mirror it.
        size: of the view; None: the encoder's.
    """
    size = size or pre.image_size
    found = as_bands(image, len(pre.mean))
    if box is not None:
        found = found[box[1] : box[3], box[0] : box[2]]
    pixels = torch.from_numpy(scaled(found)).permute(2, 0, 1)[None]
    is_smooth = pre.interpolation not in ("nearest", "box", "hamming")
    mode = {"bilinear": "bilinear", "nearest": "nearest"}.get(
        pre.interpolation, "bicubic" if is_smooth else "area"
    )
    smooth: dict[str, Any] = {"antialias": True} if mode in ("bilinear", "bicubic") else {}
    pixels = F.interpolate(pixels, (resized[1], resized[0]), mode=mode, **smooth)[0]
    left, top = start
    right, bottom = left + size - resized[0], top + size - resized[1]
    pixels = F.pad(pixels, (-left, right, -top, bottom))  # below 0 it crops
    view = pixels.flip(-1) if flip else pixels
    mean, std = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (pre.mean, pre.std))
    return ((view - mean) / std).contiguous()
