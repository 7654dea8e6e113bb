"""Encoded bytes to RGB pictures, by the fastest decoder that is sound for them.

Knows neither sources nor views. JPEGs go to simplejpeg where it is installed (twice PIL's speed, and the only
decoder that raises on a JPEG with rotten bits inside); what it does not take, and every other format, goes to
PIL. `counts` says how many pictures of this process took which way.
"""

from __future__ import annotations

import io
from collections import Counter

import numpy as np
from PIL import Image, UnidentifiedImageError

try:
    import simplejpeg
except ImportError:  # an optional dependency: selfmask_dist[fast]
    simplejpeg = None

counts: Counter[str] = Counter()
_JPEG_START = b"\xff\xd8\xff"
_STARTS = {
    "jpg": (_JPEG_START,),
    "png": (b"\x89PNG\r\n\x1a\n",),
    "webp": (b"RIFF",),
    "gif": (b"GIF8",),
    "bmp": (b"BM",),
    "tif": (b"II*\0", b"MM\0*"),
    "ppm": (b"P6", b"P3"),
    "pgm": (b"P5", b"P2"),
}


def decode(data: bytes) -> Image.Image:
    """Return an encoded picture as RGB. Raises ValueError for bytes that are not a whole, readable picture.

    Grey, palette, CMYK and transparent pictures are converted (transparency is dropped), 16-bit grey is
    scaled to 8 bits. EXIF orientation is not applied, as in torchvision's and timm's own readers.
    """
    if simplejpeg is not None and data.startswith(_JPEG_START):
        pixels = _decode_jpeg(data)
        if pixels is not None:
            counts["simplejpeg"] += 1
            return Image.fromarray(pixels)
    counts["PIL"] += 1
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
        return _to_rgb(image)
    except UnidentifiedImageError:
        raise ValueError(f"not a picture that PIL can read ({len(data)} bytes)") from None
    except Exception as error:
        # broken files make PIL's plug-ins raise OSError, SyntaxError, struct.error, zlib.error and more
        raise ValueError(f"cannot be decoded ({type(error).__name__}: {error})") from error


def kind_of(data: bytes) -> str | None:
    """Return the usual extension of what the first bytes promise; None where that is no picture."""
    for extension, starts in _STARTS.items():
        if data.startswith(starts):
            return extension
    return None


def _decode_jpeg(data: bytes) -> np.ndarray | None:
    """Return pixels (height, width, 3) in uint8; None for a colour space that PIL has to convert."""
    try:
        _, _, space, _ = simplejpeg.decode_jpeg_header(data)
        if space not in ("YCbCr", "Gray", "RGB"):
            return None
        # exact transform and smooth upsampling are the decoder's defaults in PIL too: the same pixels
        pixels: np.ndarray = simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False)
    except ValueError as error:
        raise ValueError(f"cannot be decoded ({error})") from error
    return pixels


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        # PIL would clip 16-bit values at 255: an all-white picture
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the way round that PIL asks for; from P straight to RGB it warns
    return image.convert("RGB")
