"""The bytes of a mask file: a header, sections, and checksums over both.

    bytes 0-7    magic b"SELFMASK"
    8-11         format version, little-endian uint32: 2, or 3 where a mask is more than bits
    12-19        length H of the header as it is stored, little-endian uint64
    20-51        sha256 of bytes 0-19 and the header
    52-52+H      header, UTF-8 JSON as one zstd frame that states its size
    ...          sections, back to back
    last 32      sha256 of everything before

A section is found by [offset, length, crc32] in the header, so that one can be read without the others.
Knows nothing of what header and sections mean.
"""

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard

from selfmask_dist.maskfile.mask import MaskFileError

MAGIC = b"SELFMASK"
VERSION = 2
VERSION_WITH_FORMS = 3  # version 2, and kinds of masks that its readers do not know
MAX_HEADER_BYTES = 64 * 2**20
_PREFIX = struct.Struct("<8sIQ")
_DIGEST_BYTES = 32
_BODY = _PREFIX.size + _DIGEST_BYTES


class Sections:
    """Collects sections while a header is made."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self._size = 0

    def add(self, data: bytes) -> list[int]:
        """Returns where it will be found."""
        place = [self._size, len(data), zlib.crc32(data)]
        self.parts.append(data)
        self._size += len(data)
        return place


def write(path: Path, header: Mapping[str, Any], sections: Sections, *, version: int = VERSION) -> int:
    """Write by way of a temporary name and one rename; returns the number of bytes."""
    text = json.dumps(header, sort_keys=True, allow_nan=False, separators=(",", ":")).encode()
    if len(text) > MAX_HEADER_BYTES:
        raise MaskFileError(f"the header takes {len(text):,} bytes, the format allows {MAX_HEADER_BYTES:,}")
    coded = zstandard.ZstdCompressor(level=19).compress(text)
    prefix = _PREFIX.pack(MAGIC, version, len(coded))
    body = b"".join([prefix, hashlib.sha256(prefix + coded).digest(), coded, *sections.parts])
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as stream:
            stream.write(body + hashlib.sha256(body).digest())
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return len(body) + _DIGEST_BYTES


@dataclass(frozen=True)
class Container:
    """A file whose header is read and verified."""

    header: dict[str, Any]
    num_bytes: int  # of all sections
    _read: Callable[[int, int], bytes]  # offset and length among the sections

    def section(self, place: list[int]) -> bytes:
        """One section, verified.

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
    """The whole file, every byte of it verified.

    Raises:
        MaskFileError: not a mask file, another version, or damaged in any byte.
        FileNotFoundError: no such file.
    """
    data = path.read_bytes()
    _check_kind(path, data[: _PREFIX.size], len(data))
    if hashlib.sha256(memoryview(data)[:-_DIGEST_BYTES]).digest() != data[-_DIGEST_BYTES:]:
        raise MaskFileError(
            f"{path} is damaged or cut short: its checksum does not match; copy it again from its source"
        )
    return _open(path, len(data), lambda offset, length: data[offset : offset + length])


def open_part(path: Path) -> Container:
    """The header alone, verified; sections are read and verified when asked for. Errors as in `read`."""
    size = path.stat().st_size

    def part(offset: int, length: int) -> bytes:
        with open(path, "rb") as stream:
            stream.seek(offset)
            return stream.read(length)

    _check_kind(path, part(0, _PREFIX.size), size)
    return _open(path, size, part)


def _check_kind(path: Path, prefix: bytes, size: int) -> None:
    if size < _BODY + _DIGEST_BYTES or not prefix.startswith(MAGIC):
        raise MaskFileError(f"{path} is not a mask file (it does not begin with {MAGIC.decode()})")


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
        header, size - _DIGEST_BYTES - start, lambda offset, length: read(start + offset, length)
    )


def _decompress(coded: bytes) -> bytes:
    stated = zstandard.frame_content_size(coded)
    if not 0 <= stated <= MAX_HEADER_BYTES:
        raise ValueError(f"it states a size of {stated} bytes, the limit is {MAX_HEADER_BYTES}")
    return zstandard.ZstdDecompressor().decompress(coded, allow_extra_data=False)
