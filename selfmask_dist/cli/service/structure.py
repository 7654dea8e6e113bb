"""What a file of a few pixels can hide: pieces without number, before or between its pixels.

PIL reads blocks, markers and tags one by one in Python, and JPEG's decoder passes over the whole picture for
each scan; so a small picture in a large file can take many seconds. Here pieces are counted, and a picture
with more than any program writes is refused. Knows nothing of HTTP.
"""

import base64
import binascii
import io
import struct

_MOST_READS = 20_000  # of a file without many bytes
_BYTES_OF_READ = 256  # a larger one may have one more for each of these
_MOST_SCANS = 500  # of a JPEG; a progressive one has about 10
_MOST_SCANNED = 1_000_000_000  # pixels over all scans
_MOST_TILES = 100_000  # of a TIFF, strips included
_MOST_TEXT = 2**20  # bytes of a picture written as decimal numbers (PPM), which PIL reads in Python


class PiecesError(Exception):
    """A file of more pieces than a picture needs."""


class _Counted(io.BytesIO):
    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._left = _MOST_READS + len(data) // _BYTES_OF_READ

    def read(self, size: int | None = -1, /) -> bytes:
        self._left -= 1
        if self._left < 0:
            raise PiecesError("consists of too many small blocks; save it anew, as JPEG or PNG")
        return super().read(size)


def counted(data: bytes) -> io.BytesIO:
    """Return data as a file that raises PiecesError where it is read in too many pieces."""
    return _Counted(data)


def check_structure(data: bytes) -> None:
    """Raise PiecesError for what PIL would read whole before anything can be counted."""
    if data[:2] in (b"P1", b"P2", b"P3") and len(data) > _MOST_TEXT:
        raise PiecesError(
            f"is written as text of more than {_MOST_TEXT:,} bytes; send a JPEG, PNG or binary PPM"
        )
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+") and _num_tiles(data) > _MOST_TILES:
        raise PiecesError(f"has more than {_MOST_TILES:,} strips or tiles; save it anew with larger ones")


def check_scans(data: bytes, num_pixels: int) -> None:
    """Raise PiecesError for a JPEG whose scans are too many for its pixels."""
    # within a scan, 0xFF is followed by 0 or a restart marker; a thumbnail's scans count too, and are few
    scans = data.count(b"\xff\xda")
    if scans > _MOST_SCANS or scans * num_pixels > max(_MOST_SCANNED, 4 * num_pixels):
        raise PiecesError(f"is a JPEG of {scans:,} scans; save it anew, which makes it one of a few")


def _num_tiles(data: bytes) -> int:
    """Return how many strips or tiles a TIFF states for its first picture; 0 where it cannot be read."""
    order = "<" if data[:1] == b"I" else ">"
    start, count, entry = ("Q", "Q", "HHQQ") if data[2:3] == b"+" or data[3:4] == b"+" else ("I", "H", "HHII")
    try:
        (place,) = struct.unpack_from(order + start, data, 8 if start == "Q" else 4)
        (number,) = struct.unpack_from(order + count, data, place)
        place += struct.calcsize(order + count)
        size = struct.calcsize(order + entry)
        entries = (
            struct.unpack_from(order + entry, data, place + size * i) for i in range(min(number, 4096))
        )
        return max((entry[2] for entry in entries if entry[0] in (273, 279, 324, 325)), default=0)
    except struct.error:
        return 0


def not_a_picture(data: bytes, content_type: str) -> str:
    """Return a sentence about a body that is no picture: what it looks like, and what to send."""
    return (
        f"the body {_what(data, content_type)} no picture that can be read; send the bytes of a JPEG, PNG or"
        " WebP alone, as `curl --data-binary @photo.jpg` does"
    )


def _what(data: bytes, content_type: str) -> str:
    start = data[:64].lstrip()
    if not data:
        return "is empty,"
    if content_type.startswith("multipart/"):
        return f"is {content_type.partition(';')[0][:50]}, a form and"
    if start[:1] in (b"{", b"["):
        return "looks like JSON,"
    if start.startswith(b"data:"):
        return "is a data URL,"
    if data[4:8] == b"ftyp":
        return "is AVIF, HEIC or a film,"
    for mark, name in ((b"\x1f\x8b", "compressed by gzip"), (b"%PDF", "a PDF"), (b"<", "HTML, SVG or XML")):
        if start.startswith(mark):
            return f"is {name},"
    try:
        if len(start) >= 32:
            base64.b64decode(start[: len(start) // 4 * 4].replace(b"\n", b""), validate=True)
            return "looks like base64 text,"
    except (binascii.Error, ValueError):
        pass
    return "is"
