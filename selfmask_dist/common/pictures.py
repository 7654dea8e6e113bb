"""What counts as a picture, by its bytes: its kind, its shape, and its pixels as RGB of eight bits.

Knows PIL and numpy, and neither torch, tars nor folders. Converters and the reader share it, so that what the
one writes the other reads. Values of more than eight bits are scaled by the range of their type,

    integers of n bits:  v >> (n - 8)    (n - 9 for signed ones, which must not be negative)
    floats:              round(255 v),   which must be in [0, 1],

and whatever else would become a picture that is black, white or wrong raises ValueError.
"""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

# A view resizes the short side to a given size, so its work grows with this ratio: at 100 to 1 and a short
# side of 256 the largest picture on the way has 256 x 25,600 pixels, 26 MB.
MAX_ASPECT = 100
IGNORED = 255  # a pixel of a label map that does not count

# format that PIL reads -> the extension that its files get in a tar; MPO is the JPEG of cameras that append a
# second picture, of which the first is read
EXTENSION_OF_FORMAT = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "GIF": "gif",
    "BMP": "bmp",
    "DIB": "bmp",
    "TIFF": "tif",
    "PPM": "ppm",
    "AVIF": "avif",
    "JPEG2000": "jp2",
    "TGA": "tga",
    "ICO": "ico",
    "ICNS": "icns",
    "PCX": "pcx",
    "SGI": "sgi",
    "QOI": "qoi",
    "DDS": "dds",
    "PSD": "psd",
}
# names that are taken for pictures before anybody looks inside, in the order of preference
EXTENSIONS = (
    *("jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "pbm", "pnm"),
    *("avif", "avifs", "apng", "dib", "mpo", "jp2", "j2k", "jpf", "jpx", "tga", "ico", "icns", "qoi"),
)


class NoPictureError(ValueError):
    """Bytes that do not start like any picture that PIL knows."""


class ShapeError(ValueError):
    """A picture is too long and thin, or too large, to be worked on."""


# drawings and films that PIL would hand to another program, or knows only by name
_NO_PICTURES = {"EPS", "WMF", "MPEG", "GRIB", "BUFR", "HDF5"}

_ORIENTATION = 274  # EXIF's tag

_SYSTEM_FOLDERS = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information"}
_SYSTEM_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}
_ABOUT = re.compile(
    r"(readme|licen[cs]e|copying|notice|changelog|citation|authors)(\.(md|txt|rst|cff|html?))?"
)


def is_system_file(name: str) -> bool:
    """Return whether a path names what systems leave behind: hidden files, `Thumbs.db`, `__MACOSX`."""
    *folders, last = name.split("/")  # no path object: a walk asks this of millions of members
    return (
        last[:1] == "." or last.lower() in _SYSTEM_FILES or not _SYSTEM_FOLDERS.isdisjoint([*folders, last])
    )


def is_about_the_data(name: str) -> bool:
    """Return whether a path names a text that goes with a data set, such as README.md or LICENSE."""
    return _ABOUT.fullmatch(name.rpartition("/")[2].lower()) is not None


def open_picture(data: bytes) -> Image.Image:
    """Return a picture of which the header alone was read: its size, mode and format.

    Raises:
        ValueError: PIL cannot read it, it is a drawing or a film, or it has more pixels than PIL allows.
    """
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        raise NoPictureError(f"not a picture that PIL can read ({len(data)} bytes)") from None
    except Exception as error:
        # broken files make PIL's plug-ins raise OSError, SyntaxError, struct.error, zlib.error and more
        raise ValueError(f"cannot be decoded ({type(error).__name__}: {error})") from error
    if image.format in _NO_PICTURES:
        raise ValueError(f"is {image.format} inside, a drawing or a film; convert it to JPEG or PNG")
    check_size(image.size)
    return image


def read_picture(data: bytes) -> Image.Image:
    """Return the picture with its pixels, in the mode that it has; raises as `open_picture` does."""
    image = open_picture(data)
    try:
        image.load()
    except Exception as error:
        raise ValueError(f"cannot be decoded ({type(error).__name__}: {error})") from error
    return image


def check_size(size: tuple[int, int]) -> None:
    """Check a (width, height) before pixels are decoded.

    Raises:
        ShapeError: it has more pixels than PIL allows, a limit that other decoders do not have.
    """
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and size[0] * size[1] > 2 * most:
        raise ShapeError(f"is {size[0]} x {size[1]} pixels, more than {2 * most:,}; resize it")


def check_shape(size: tuple[int, int]) -> None:
    """Check a (width, height) before a view is made of it.

    Raises:
        ShapeError: its sides differ more than `MAX_ASPECT` times.
    """
    if max(size) > MAX_ASPECT * min(size):
        raise ShapeError(
            f"is {size[0]} x {size[1]} pixels; its sides may differ {MAX_ASPECT} times at most, cut or resize"
            " it"
        )


def kind_of(data: bytes) -> str | None:
    """Return the usual extension of a file by its first bytes, a thousand of them or all; None: no picture.

    Kinds without a mark at their start (TGA) are recognised by their names alone.
    """
    for start, kind in ((b"\xff\xd8\xff", "jpg"), (b"\x89PNG\r\n\x1a\n", "png"), (b"GIF8", "gif")):
        if data.startswith(start):
            return kind
    if data[:4] == b"RIFF":
        return "webp" if data[8:12] == b"WEBP" else None
    if data[:4] in (b"II*\0", b"MM\0*"):
        return "tif"
    if data[4:12] in (b"ftypavif", b"ftypavis"):
        return "avif"
    Image.init()
    marked = [name for name, (_, accept) in Image.OPEN.items() if accept is not None]
    try:
        image = Image.open(io.BytesIO(data), formats=[name for name in marked if name not in _NO_PICTURES])
    except Exception:  # it is none, or too broken to say
        return None
    return EXTENSION_OF_FORMAT.get(str(image.format))


def extension_of(image: Image.Image) -> str:
    """Return the extension of a picture by its format. Raises ValueError for one that has none here."""
    extension = EXTENSION_OF_FORMAT.get(str(image.format))
    if extension is None:
        raise ValueError(f"is {image.format} inside; convert it to JPEG or PNG")
    return extension


def to_rgb(image: Image.Image) -> Image.Image:
    """Return a loaded picture as RGB; the module's text says how deep pixels are scaled.

    Grey, palette, CMYK, one-bit and transparent pictures are converted; transparency is dropped.

    Raises:
        ValueError: values that have no place in 0..255, or a mode that PIL cannot convert.
    """
    if image.mode == "RGB":
        return image
    if image.mode == "F":
        return Image.fromarray(_bytes_of_floats(np.asarray(image))).convert("RGB")
    if image.mode.startswith("I"):
        return Image.fromarray(_bytes_of_integers(image)).convert("RGB")
    if image.mode in ("P", "PA", "RGBa", "La"):
        # the way round that PIL asks for; from P straight to RGB it warns of transparency
        image = image.convert({"La": "LA"}.get(image.mode, "RGBA"))
    try:
        return image.convert("RGB")
    except ValueError:
        raise ValueError(f"has pixels of mode {image.mode}; convert it to RGB or grey first") from None


def is_turned(image: Image.Image) -> bool:
    """Return whether the EXIF data of a picture ask to turn or mirror it, which readers here do not do."""
    try:
        return image.getexif().get(_ORIENTATION, 1) not in (0, 1)
    except Exception:  # data as broken as they come
        return False


def is_deep(image: Image.Image) -> bool:
    """Return whether the pixels have more than eight bits, which JPEG cannot hold."""
    return image.mode[0] in "IF"


def _bytes_of_floats(values: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.uint8]:
    low, high = float(values.min()), float(values.max())  # nan where any value is
    if not (low >= 0 and high <= 1):
        found = "nan" if np.isnan(low) else f"{low:g} to {high:g}"
        raise ValueError(
            f"has pixels that are floats, from {found}; only those in 0 to 1 have a known scale,"
            " convert it to 8 or 16 bits"
        )
    return np.rint(values * 255).astype(np.uint8)


def _bytes_of_integers(image: Image.Image) -> npt.NDArray[np.uint8]:
    bits, is_signed, is_inverted = _integer_type(image)
    values = np.asarray(image)
    if is_signed and values.min() < 0:
        raise ValueError(
            f"has pixels that are negative ({values.min()}), of which the scale is not known; convert it to 8"
            " or 16 bits"
        )
    if bits == 32 and not is_signed:
        values = values.view(np.uint32)  # PIL has no unsigned 32 bits and keeps them as they lie
    scaled = (values >> (bits - 8 - is_signed)).astype(np.uint8)
    if not scaled.any() and values.any():
        raise ValueError(
            f"has pixels of {bits} bits of which the largest is {values.max()}: it would be black; scale it"
            " to the range of its type, or convert it to 8 bits"
        )
    return ~scaled if is_inverted else scaled


def _integer_type(image: Image.Image) -> tuple[int, int, bool]:
    """Return bits of a pixel, 1 where they are signed, and whether 0 is white."""
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        bits = int(tags.get(258, (16,))[0])
        is_signed = int(tags.get(339, (1,))[0]) == 2
        return bits, int(is_signed), tags.get(262) == 0
    if image.mode.startswith("I;16") or image.format in ("PNG", "PPM"):
        return 16, 0, False  # PIL scales PGM's own range to 16 bits, in a mode of 32
    return 32, 1, False


def read_label_map(data: bytes, size: tuple[int, int], num_classes: int) -> Image.Image:
    """Return a label map as one byte a pixel.

    Args:
        data: an encoded picture of grey or palette values; black and white ones are classes 0 and 1.
        size: of its picture, (width, height).

    Raises:
        ValueError: it cannot be decoded, is of another size, or has values that are no class.
    """
    try:
        with Image.open(io.BytesIO(data)) as opened:
            opened.load()
            labels = opened
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"its label map cannot be decoded ({error})") from error
    if labels.mode not in ("L", "P", "1"):
        raise ValueError(f"its label map is of PIL's mode {labels.mode}; it needs one byte a pixel (L or P)")
    if labels.size != size:
        raise ValueError(
            f"its label map has {labels.size[0]} x {labels.size[1]} pixels, and the picture "
            f"{size[0]} x {size[1]}"
        )
    values = np.asarray(labels).astype(np.uint8)
    if (bad := values[(values >= num_classes) & (values != IGNORED)]).size:
        raise ValueError(
            f"its label map has the value {int(bad[0])}, and there are {num_classes} classes (0 to "
            f"{num_classes - 1}; {IGNORED} is not counted)"
        )
    return Image.fromarray(values)
