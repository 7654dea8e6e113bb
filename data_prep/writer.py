"""One shard: pictures -> a tar under a hidden name, and a report that says what is in it.

A sample is `key.jpg` (the original bytes, unless shrunk), `key.cls` (class number) and `key.json` (class
name, original path, crc32). The same pictures in the same order give the same bytes: no time, no owner. Knows
no splits and no torch.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, UnidentifiedImageError

from .options import ConversionOptions

# by content, not by name; MPO is the JPEG of cameras that append a second picture
_EXTENSION_OF_FORMAT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}


@dataclass(frozen=True)
class Picture:
    """A file to convert.

    name: its path inside the source, which key.json records. path: None where it is a member of an archive.
    """

    path: Path | None
    name: str
    key: str
    class_name: str


@dataclass(frozen=True)
class RejectedFile:
    """A file that was left out; a line of `rejects.jsonl`. path: inside the source."""

    path: str
    reason: str


@dataclass(frozen=True)
class _ShardEntry:
    name: str
    samples: int
    bytes: int
    sha256: str


# folder, number of the shard, pictures (with their bytes where these are read), class numbers, options
Job = tuple[Path, int, Iterable[tuple[Picture, bytes | None]], dict[str, int], ConversionOptions]


def write_shard(job: Job) -> dict[str, Any]:
    """Write one shard under its hidden name, and return its report: counts, size, hash, files left out.

    The report is a file too, written last: where it is there, the shard is whole and is not written again.
    Takes one argument because worker processes get it by pickle.

    Raises:
        ValueError: a file is no readable picture, unless `options.skip_broken`; the message names it.
    """
    from webdataset import TarWriter  # takes 0.2 s, which --help need not wait for

    target, number, pictures, label, options = job
    name = f"shard-{number:06d}.tar"
    report_path = target / f".{name}.report"
    if report_path.exists():
        done: dict[str, Any] = json.loads(report_path.read_text())
        return done
    rejects: list[RejectedFile] = []
    counts: Counter[str] = Counter()
    writing = target / f".{name}.writing"
    with open(writing, "wb") as file:
        hashing = _HashingFile(file)
        with TarWriter(hashing, encoder=False, mtime=0, user="", group="", format="PAX_FORMAT") as writer:
            for picture, extension, data in _encode_all(pictures, options, rejects):
                about = {
                    "class": picture.class_name,
                    "path": picture.name,
                    "crc32": zlib.crc32(data),
                }
                writer.write(
                    {
                        "__key__": picture.key,
                        extension: data,
                        "cls": str(label[picture.class_name]).encode(),
                        "json": json.dumps(about).encode(),
                    }
                )
                counts[picture.class_name] += 1
        file.flush()
        os.fsync(file.fileno())
    shard = _ShardEntry(name, counts.total(), hashing.size, hashing.sha256.hexdigest())
    report = {
        "pictures": counts.total() + len(rejects),
        "shard": asdict(shard) if shard.samples else None,
        "counts": counts,
        "rejects": [asdict(reject) for reject in rejects],
    }
    if shard.samples:
        writing.rename(partial_path(target, name))
    else:
        writing.unlink()
    temporary = target / f".{name}.report.writing"
    temporary.write_text(json.dumps(report))
    temporary.rename(report_path)
    return report


def _encode_all(
    pictures: Iterable[tuple[Picture, bytes | None]], options: ConversionOptions, rejects: list[RejectedFile]
) -> Iterator[tuple[Picture, str, bytes]]:
    """Yield picture, extension and bytes of the readable ones; the others go to `rejects`, or raise."""
    for picture, data in pictures:
        try:
            extension, encoded = _encode(picture.path, data, options)
        except ValueError as error:
            if not options.skip_broken:
                raise ValueError(
                    f"{picture.path or picture.name}: {error}; remove it, or list and leave out such files"
                    " with --skip-broken"
                ) from error
            rejects.append(RejectedFile(picture.name, str(error)))
            continue
        yield picture, extension, encoded


def _encode(path: Path | None, data: bytes | None, options: ConversionOptions) -> tuple[str, bytes]:
    """Decode a picture as a check, and return its extension by content and its bytes. Raises ValueError."""
    try:
        if data is None:
            assert path is not None
            data = path.read_bytes()
        image = Image.open(io.BytesIO(data))
        image.load()
    except UnidentifiedImageError:
        raise ValueError("not a picture that PIL can read") from None
    except Exception as error:
        # broken files make PIL's plug-ins raise OSError, SyntaxError, struct.error, zlib.error and more
        raise ValueError(f"cannot be read ({type(error).__name__}: {error})") from error
    extension = _EXTENSION_OF_FORMAT.get(str(image.format))
    if extension is None:
        raise ValueError(f"is {image.format} inside; convert it to JPEG, PNG or WebP")
    if options.short_side is None or min(image.size) <= options.short_side:
        return extension, data
    if image.mode.startswith("I"):
        raise ValueError("has 16 bits per pixel, which JPEG cannot hold; convert it to 8 bits first")
    scale = options.short_side / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    plain = image if image.mode in ("L", "RGB") else image.convert("RGBA").convert("RGB")
    buffer = io.BytesIO()
    plain.resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=options.quality)
    return "jpg", buffer.getvalue()


class _HashingFile:
    """Hashes what is written through it, which saves reading the shard again."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.size += len(data)
        return self._file.write(data)


def partial_path(target: Path, name: str) -> Path:
    """Return the hidden path of a file that is whole and waits to get its name; see `shards.publish`."""
    return target / f".{name}.partial"


def some(names: Sequence[str]) -> str:
    """Return the first few of many names, for a message."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
