"""One shard: pictures -> a tar under a hidden name, and a report that says what is in it.

A sample is `key.jpg` (the original bytes, unless shrunk), `key.cls` (class number, absent where there is no
label) and `key.json` (class name, original path, crc32). The same pictures in the same order give the same
bytes: no time, no owner. Knows no splits and no torch.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from selfmask_dist.common.pictures import (
    check_shape,
    extension_of,
    is_deep,
    is_turned,
    read_label_map,
    read_picture,
    to_rgb,
)

from .options import ConversionOptions


@dataclass(frozen=True)
class Picture:
    """A file to convert. name: its path inside the source, as recorded in key.json. path: None where it is a
    member of an archive. class_name: None where it has no label. target: what it is trained towards beside
    one class, for key.json; None where it is nothing else. label_map: its key.seg.png.
    """

    path: Path | None
    name: str
    key: str
    class_name: str | None
    target: dict[str, Any] | None = None
    label_map: Path | None = None


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


# a picture's bytes where they were read already; a text says why they cannot be had
Read = bytes | str | None
# folder, number of the shard, pictures, class numbers, options
Job = tuple[Path, int, Iterable[tuple[Picture, Read]], dict[str, int], ConversionOptions]


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
    contents: list[tuple[str, str | None, str]] = []
    num_targets = 0  # pictures with a target beside one class
    turned: list[str] = []  # by EXIF, which no reader here heeds
    writing = target / f".{name}.writing"
    with open(writing, "wb") as file:
        hashing = _HashingFile(file)
        found = _encode_all(pictures, options, rejects, num_classes=len(label))
        with TarWriter(hashing, encoder=False, mtime=0, user="", group="", format="PAX_FORMAT") as writer:
            for picture, extension, data, is_turned, label_map in found:
                turned += [picture.name] if is_turned else []
                about = {
                    "class": picture.class_name,
                    "path": picture.name,
                    "crc32": zlib.crc32(data),
                    **(picture.target or {}),
                }
                sample: dict[str, Any] = {"__key__": picture.key, extension: data}
                if picture.class_name is not None:
                    sample["cls"] = str(label[picture.class_name]).encode()
                if label_map is not None:
                    sample["seg.png"] = label_map
                writer.write(sample | {"json": json.dumps(about).encode()})
                digest = hashlib.blake2b(data, digest_size=12).hexdigest()
                num_targets += picture.target is not None
                contents.append((digest, picture.class_name, picture.name))
        file.flush()
        os.fsync(file.fileno())
    counts = Counter(class_name for _, class_name, _ in contents if class_name is not None)
    shard = _ShardEntry(name, len(contents), hashing.size, hashing.sha256.hexdigest())
    report = {
        "pictures": len(contents) + len(rejects),
        "shard": asdict(shard) if shard.samples else None,
        "counts": counts,
        "contents": contents,
        "targets": num_targets,
        "turned": turned,
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
    pictures: Iterable[tuple[Picture, Read]],
    options: ConversionOptions,
    rejects: list[RejectedFile],
    *,
    num_classes: int,
) -> Iterator[tuple[Picture, str, bytes, bool, bytes | None]]:
    """Yield picture, extension, bytes, whether EXIF would turn it, and its label map, of the readable ones;
    the others go to `rejects`, or raise.
    """
    for picture, data in pictures:
        try:
            extension, encoded, is_turned = _encode(picture.path, data, options)
            label_map = None if picture.label_map is None else _encode_map(picture, encoded, num_classes)
        except ValueError as error:
            if not options.skip_broken:
                raise ValueError(
                    f"{picture.path or picture.name}: {error}; remove it, or list and leave out such files"
                    " with --skip-broken"
                ) from error
            rejects.append(RejectedFile(picture.name, str(error)))
            continue
        yield picture, extension, encoded, is_turned, label_map


def _encode(path: Path | None, data: Read, options: ConversionOptions) -> tuple[str, bytes, bool]:
    """Decode a picture as a check, and return its extension by content, its bytes and whether EXIF would turn
    it. Raises ValueError.
    """
    if isinstance(data, str):
        raise ValueError(data)
    if data is None:
        assert path is not None
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ValueError(f"cannot be read ({error.strerror})") from error
    image = read_picture(data)
    check_shape(image.size)  # no view can be made of it
    extension, would_turn = extension_of(image), is_turned(image)
    if is_deep(image) or image.mode not in ("L", "RGB", "RGBA", "P", "CMYK"):
        to_rgb(image)  # raises where the reader would: its values have no known scale
    if options.short_side is None or min(image.size) <= options.short_side:
        return extension, data, would_turn
    if is_deep(image):
        raise ValueError("has more than 8 bits per pixel, which JPEG cannot hold; convert it to 8 bits first")
    scale = options.short_side / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    plain = image if image.mode in ("L", "RGB") else to_rgb(image)
    buffer = io.BytesIO()
    plain.resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=options.quality)
    return "jpg", buffer.getvalue(), would_turn


def _encode_map(picture: Picture, encoded: bytes, num_classes: int) -> bytes:
    """Return a picture's label map as PNG, shrunk to the nearest pixels where the picture was shrunk.

    Raises:
        ValueError: it is not a map of this picture; see `read_label_map`.
    """
    assert picture.label_map is not None
    assert picture.path is not None
    data = picture.label_map.read_bytes()
    with Image.open(picture.path) as whole, Image.open(io.BytesIO(encoded)) as kept:
        labels = read_label_map(data, whole.size, num_classes)
        if kept.size == whole.size:
            return data
        buffer = io.BytesIO()
        labels.resize(kept.size, Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()


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
