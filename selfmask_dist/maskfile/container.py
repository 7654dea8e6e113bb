"""The bytes of a mask file: a header, sections, and checksums over both.

    bytes 0-7    magic b"SELFMASK"
    8-11         format version, little-endian uint32: 2, or 3 where a mask is more than bits
    12-19        length H of the header as it is stored, little-endian uint64
    20-51        sha256 of bytes 0-19 and the header
    52-52+H      header, UTF-8 JSON as one zstd frame that states its size
    ...          sections, back to back
    last 32      sha256 of everything before

A section is found by [offset, length, crc32] in the header, so that one can be read without the others.
Arrays, scales and shapes are read here
too, and no number is believed before it is checked. Knows nothing of masks.
"""

import hashlib
import itertools
import json
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from torch import Tensor

from selfmask_dist.common.files import replacing
from selfmask_dist.maskfile.mask import MaskFileError

MAGIC = b"SELFMASK"
VERSION = 2
VERSION_WITH_FORMS = 3  # version 2, and kinds of masks that its readers do not know
MAX_HEADER_BYTES = 64 * 2**20
_PREFIX = struct.Struct("<8sIQ")
_DIGEST_BYTES = 32
_BODY = _PREFIX.size + _DIGEST_BYTES
_BLOCK_BYTES = 2**24  # copied at a time
_DAMAGED = "{} is damaged or cut short: its checksum does not match; copy it again from its source"
DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(name).newbyteorder("<")
    for name in ("float16", "float32", "float64", "int64", "uint8", "bool")
}


# what is found in a mask file's place, by its first bytes
_OTHERS = {
    b"PK": "a zip archive, such as torch.save writes",
    b"\x1f\x8b": "compressed with gzip; unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it first",
    b"version https://git": "a pointer of Git LFS; git lfs pull brings the file",
    b"<": "a web page; the download did not bring the file",
    b"{": "JSON text",
}


class Sections:
    """Collects sections while a header is made."""

    def __init__(self, *, start: int = 0) -> None:
        self.parts: list[bytes] = []
        self._size = start  # bytes of sections that are there already

    def add(self, data: bytes) -> list[int]:
        """Add a section and return its place: [offset, length, crc32]."""
        place = [self._size, len(data), zlib.crc32(data)]
        self.parts.append(data)
        self._size += len(data)
        return place


def write(path: Path, header: Mapping[str, Any], sections: Sections, *, version: int = VERSION) -> int:
    """Write a file, by way of a temporary name and one rename, and return the number of its bytes."""
    return _write(path, header, sections.parts, version)


def rewrite_header(
    path: Path,
    change_fn: Callable[[dict[str, Any]], dict[str, Any]],
    *,
    num_kept: int | None = None,
    more: Iterable[bytes] = (),
) -> int:
    """Write a file anew with another header and the same sections, as `write` does; return its bytes.

    Args:
        num_kept: of the sections, only so many bytes; None: all of them.
        more: sections to put behind those.

    Raises:
        MaskFileError: as `read` does; the file then stays as it was.
    """
    old = open_part(path)
    start, stop = path.stat().st_size - _DIGEST_BYTES - old.num_bytes, path.stat().st_size - _DIGEST_BYTES
    left = old.num_bytes if num_kept is None else num_kept

    def sections(left: int) -> Iterator[bytes]:
        with open(path, "rb") as stream:
            found = hashlib.sha256(stream.read(start))
            while block := stream.read(min(_BLOCK_BYTES, stop - stream.tell())):
                found.update(block)
                yield block[:left]
                left -= len(block[:left])
            if found.digest() != stream.read():
                raise MaskFileError(_DAMAGED.format(path))
        yield from more

    return _write(path, change_fn(old.header), sections(left), old.version)


def _write(path: Path, header: Mapping[str, Any], parts: Iterable[bytes], version: int) -> int:
    text = json.dumps(header, sort_keys=True, allow_nan=False, separators=(",", ":")).encode()
    if len(text) > MAX_HEADER_BYTES:
        raise MaskFileError(f"the header takes {len(text):,} bytes, the format allows {MAX_HEADER_BYTES:,}")
    coded = zstandard.ZstdCompressor(level=19).compress(text)
    prefix = _PREFIX.pack(MAGIC, version, len(coded))
    start = (prefix, hashlib.sha256(prefix + coded).digest(), coded)
    digest, size = hashlib.sha256(), 0
    with replacing(path, sync=True) as partial, open(partial, "wb") as stream:
        for part in itertools.chain(start, parts):
            digest.update(part)
            size += stream.write(part)
        size += stream.write(digest.digest())
    return size


@dataclass(frozen=True)
class Container:
    """A file whose header is read and verified."""

    header: dict[str, Any]
    version: int
    num_bytes: int  # of all sections
    _read: Callable[[int, int], bytes]  # offset and length among the sections

    def section(self, place: list[int]) -> bytes:
        """Return one section, verified.

        Raises:
            ValueError: it lies outside the file, or is damaged.
        """
        offset, length, checksum = place
        if not 0 <= offset <= offset + length <= self.num_bytes:
            raise ValueError(f"section [{offset}, {length}] lies outside the file")
        data = self._read(offset, length)
        if len(data) != length or zlib.crc32(data) != checksum:
            raise ValueError(f"section [{offset}, {length}] is damaged")
        return data


def read(path: Path) -> Container:
    """Read a whole file and verify every byte of it.

    Raises:
        MaskFileError: not a mask file, another version, or damaged in any byte.
        FileNotFoundError: no such file.
    """
    data = path.read_bytes()
    _check_kind(path, data[: _PREFIX.size], len(data))
    if hashlib.sha256(memoryview(data)[:-_DIGEST_BYTES]).digest() != data[-_DIGEST_BYTES:]:
        raise MaskFileError(_DAMAGED.format(path))
    return _open(path, len(data), lambda offset, length: data[offset : offset + length])


def open_part(path: Path) -> Container:
    """Read and verify the header alone; a section is read when it is asked for. Errors as in `read`."""
    size = path.stat().st_size

    def part(offset: int, length: int) -> bytes:
        with open(path, "rb") as stream:
            stream.seek(offset)
            return stream.read(length)

    _check_kind(path, part(0, _PREFIX.size), size)
    return _open(path, size, part)


def _check_kind(path: Path, prefix: bytes, size: int) -> None:
    if size < _BODY + _DIGEST_BYTES or not prefix.startswith(MAGIC):
        is_cut = prefix.startswith(MAGIC)
        known = next((what for start, what in _OTHERS.items() if prefix.lstrip().startswith(start)), "")
        if prefix[8:9] == b"{" and not known:
            known = "a safetensors file, of weights or of scores (selfmask mask import reads scores)"
        known = "empty" if not size else f"cut short, to {size} bytes" if is_cut else known
        raise MaskFileError(
            f"{path} is not a mask file (it does not begin with {MAGIC.decode()})"
            f"{f': it is {known}' if known else ''}"
        )


def _open(path: Path, size: int, read: Callable[[int, int], bytes]) -> Container:
    prefix = read(0, _PREFIX.size)
    _, version, length = _PREFIX.unpack(prefix)
    if version not in (VERSION, VERSION_WITH_FORMS):
        way_out = "upgrade selfmask_dist" if version > VERSION else "it is from before the first release"
        raise MaskFileError(
            f"{path} has format version {version}, this selfmask_dist reads {VERSION} and "
            f"{VERSION_WITH_FORMS}; {way_out}"
        )
    if length > min(size - _BODY - _DIGEST_BYTES, MAX_HEADER_BYTES):
        raise MaskFileError(
            f"{path} states a header of {length} bytes, more than the file or the limit allows"
        )
    digest, coded = read(_PREFIX.size, _DIGEST_BYTES), read(_BODY, length)
    if hashlib.sha256(prefix + coded).digest() != digest:
        raise MaskFileError(f"{path} has a damaged header; copy it again from its source")
    try:
        header = json.loads(_decompress(coded))
        if not isinstance(header, dict):
            raise ValueError(f"it is a {type(header).__name__}")
    except (ValueError, RecursionError, zstandard.ZstdError) as error:
        raise MaskFileError(f"{path} has an inconsistent header: {error}") from error
    start = _BODY + length
    return Container(
        header, version, size - _DIGEST_BYTES - start, lambda offset, length: read(start + offset, length)
    )


def _decompress(coded: bytes) -> bytes:
    stated = zstandard.frame_content_size(coded)
    if not 0 <= stated <= MAX_HEADER_BYTES:
        raise ValueError(f"it states a size of {stated} bytes, the limit is {MAX_HEADER_BYTES}")
    return zstandard.ZstdDecompressor().decompress(coded, allow_extra_data=False)


# ---- arrays


def describe_array(name: str, tensor: Tensor, sections: Sections) -> dict[str, Any]:
    """Add a tensor's values to the sections and return its entry in the header.

    Raises:
        MaskFileError: the format does not hold its dtype.
    """
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise MaskFileError(f"{name} has dtype {dtype}; a mask file holds {', '.join(DTYPES)}")
    data = tensor.contiguous().numpy().astype(DTYPES[dtype]).tobytes()
    return {"name": name, "shape": list(tensor.shape), "dtype": dtype, "section": sections.add(data)}


def parse_array(entry: Mapping[str, Any], whole: Container) -> Tensor:
    """Return the tensor that an entry of the header describes.

    Raises:
        ValueError: the section does not hold as many values as the entry states, or not of that kind.
    """
    data, dtype = whole.section(entry["section"]), DTYPES[entry["dtype"]]
    if len(data) != count_values(entry["shape"]) * dtype.itemsize:
        raise ValueError(f"{entry['name']}: {len(data)} bytes do not make shape {entry['shape']}")
    if entry["dtype"] == "bool" and data.strip(b"\0\1"):
        raise ValueError(f"{entry['name']}: a truth value is neither 0 nor 1")
    return torch.from_numpy(np.frombuffer(data, dtype).reshape(entry["shape"]).copy())


def parse_scales(name: str, scales: Any, shape: tuple[int, int]) -> Tensor:
    """Return scales of `shape` as float64.

    Raises:
        ValueError: one is below 0 or not finite (theta would not be either), or they are of another shape.
    """
    numbers = [number for row in scales for number in row]
    if not all(type(number) in (int, float) and 0 <= number < float("inf") for number in numbers):
        raise ValueError(f"{name}: a scale is not a number of at least 0")
    if len(scales) != shape[0] or any(len(row) != shape[1] for row in scales):
        raise ValueError(f"{name}: the scales are not {shape[0]} times {shape[1]}")
    return torch.tensor(scales, dtype=torch.float64).reshape(shape)


def count_values(shape: Any) -> int:
    """Return how many values a shape has, as a product of Python's integers, which does not overflow.

    Raises:
        ValueError: it is no list of sizes.
    """
    count = 1
    if not isinstance(shape, list) or len(shape) > 16:
        raise ValueError(f"bad shape {str(shape)[:80]}")
    for size in shape:
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 2**40:
            raise ValueError(f"bad shape {str(shape)[:80]}")
        count *= size
    return count


def check_size(count: int, most: int) -> None:
    """Raise a MaskFileError where a file states more values than its reader wants to allocate."""
    if count > most:
        raise MaskFileError(
            f"it holds {count:,} values, more than the limit of {most:,}; max_weights= raises it"
        )
