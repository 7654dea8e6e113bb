"""Encoded bytes to RGB pictures, by the fastest decoder that is sound for them.

Knows neither sources nor views. JPEGs go to simplejpeg where it is installed (twice PIL's speed, and the only
decoder that raises on a JPEG with rotten bits inside); what it does not take, and every other format, goes to
PIL. `counts` says how many pictures of this process took which way.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
from PIL import Image

from selfmask_dist.common.pictures import check_size, read_picture, to_rgb
from selfmask_dist.data.views.bands import NPY_START, Bands, read_npy

try:
    import simplejpeg
except ImportError:  # an optional dependency: selfmask_dist[fast]
    simplejpeg = None

counts: Counter[str] = Counter()
_JPEG_START = b"\xff\xd8\xff"


def decode_any(data: bytes) -> Image.Image | Bands:
    """Return an encoded picture as RGB; a .npy file as an array (height, width, channels), as deep as it is.

    An array of three channels of eight bits is RGB.

    Raises:
        ValueError: as `decode`, or the file is no array that is a picture.
    """
    if not data.startswith(NPY_START):
        return decode(data)
    counts["npy"] += 1
    found = read_npy(data)
    return Image.fromarray(found) if found.dtype == np.uint8 and found.shape[2] == 3 else found


def decode(data: bytes) -> Image.Image:
    """Return an encoded picture as RGB.

    Grey, palette, CMYK and transparent pictures are converted (transparency is dropped), deep ones are scaled
    to 8 bits as `common.pictures` says. EXIF orientation is not applied, as in torchvision's and timm's own
    readers. Of a file with several pictures the first is read.

    Raises:
        ValueError: the bytes are not a whole, readable picture, or its pixels have no known scale.
    """
    if simplejpeg is not None and data.startswith(_JPEG_START):
        pixels = _decode_jpeg(data)
        if pixels is not None:
            counts["simplejpeg"] += 1
            return Image.fromarray(pixels)
    counts["PIL"] += 1
    return to_rgb(read_picture(data))


def _decode_jpeg(data: bytes) -> np.ndarray | None:
    """Return (height, width, 3) uint8; None for a colour space that is PIL's to convert."""
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError as error:
        raise ValueError(f"cannot be decoded ({error})") from error
    check_size((width, height))
    if space not in ("YCbCr", "Gray", "RGB"):
        return None
    try:
        # exact transform and smooth upsampling are the decoder's defaults in PIL too: the same pixels
        pixels: np.ndarray = simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False)
    except ValueError as error:
        raise ValueError(f"cannot be decoded ({error})") from error
    return pixels
