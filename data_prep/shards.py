"""Pictures on disk -> WebDataset tars and their `dataset.json`: what every converter shares.

A sample is `key.jpg` (the original bytes, unless shrunk), `key.cls` (class number) and `key.json` (class
name, original path). Knows no source's folder layout and no torch. The same pictures give the same bytes
(mtime 0, no owner, fixed order), and a conversion that fails or is killed leaves no half-filled folder
behind: everything is written under a temporary name, and renamed when all is there.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

# by content, not by name; MPO is the JPEG of cameras that append a second picture
_EXTENSION_OF_FORMAT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_OWN_FILES = re.compile(r"shard-\d{6}\.tar|dataset\.json|rejects\.jsonl|\..*\.partial")


@dataclass(frozen=True)
class Options:
    """What shapes the output. short_side: pixels, None keeps the original bytes. quality: JPEG's, 1 to 95."""

    max_samples_per_shard: int = 5000
    short_side: int | None = None
    quality: int = 90
    skip_broken: bool = False

    def __post_init__(self) -> None:
        if self.max_samples_per_shard < 1:
            raise ValueError(f"max samples per shard is {self.max_samples_per_shard}; it must be at least 1")
        if self.short_side is not None and self.short_side < 1:
            raise ValueError(f"short side is {self.short_side}; it must be at least 1 pixel")
        if not 1 <= self.quality <= 95:
            raise ValueError(f"quality is {self.quality}; JPEG's goes from 1 to 95")


@dataclass(frozen=True)
class Conversion:
    """One folder of tars that was written."""

    folder: Path
    classes: tuple[str, ...]
    num_samples: int
    num_rejected: int


@dataclass(frozen=True)
class Picture:
    """A file to convert. name: its path inside the source, as recorded in key.json."""

    path: Path
    name: str
    key: str
    class_name: str


@dataclass(frozen=True)
class Reject:
    """A file left out; a line of `rejects.jsonl`. path: inside the source."""

    path: str
    reason: str


@dataclass(frozen=True)
class _Shard:
    name: str
    samples: int
    bytes: int
    sha256: str


def check_target(target: Path, overwrite: bool) -> None:
    """Raises ValueError unless `target` is absent, empty, or an earlier conversion that may be replaced."""
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file; name a folder to write to")
    present = sorted(path.name for path in target.iterdir()) if target.exists() else []
    foreign = [name for name in present if not _OWN_FILES.fullmatch(name)]
    if foreign:
        raise ValueError(f"{target} holds files that no conversion wrote ({some(foreign)}); write elsewhere")
    if not overwrite and any(not name.endswith(".partial") for name in present):
        raise ValueError(f"{target} is not empty; write elsewhere, or replace what it holds with --overwrite")


def write_split(
    target: Path,
    classes: tuple[str, ...],
    pictures: list[Picture],
    rejects: list[Reject],
    options: Options,
    progress: bool,
) -> Conversion:
    """Convert one split's pictures into the tars and the `dataset.json` of the folder `target`.

    classes: of all splits, in the order of their numbers. rejects: files left out so far.
    The tars' order is pseudo-random and fixed, for readers that shuffle no further than their buffer.
    Raises ValueError naming a file that is no readable picture, unless `options.skip_broken`.
    """
    pictures = sorted(pictures, key=lambda picture: hashlib.blake2b(os.fsencode(picture.key)).digest())
    target.mkdir(parents=True, exist_ok=True)
    _remove_partials(target)
    counts = dict.fromkeys(classes, 0)
    shards: list[_Shard] = []
    try:
        with tqdm(pictures, desc=str(target), unit="img", disable=not progress) as bar:
            samples = _encode_all(bar, options, rejects)
            while first := next(samples, None):
                part = itertools.chain([first], itertools.islice(samples, options.max_samples_per_shard - 1))
                shards.append(_write_shard(target, f"shard-{len(shards):06d}.tar", part, counts))
        if not shards:
            raise ValueError(
                f"{target}: none of the {len(pictures)} pictures can be read; {rejects[-1].reason}"
            )
        description = {
            "classes": classes,
            "num_samples": sum(counts.values()),
            "samples_per_class": counts,
            "shards": [asdict(shard) for shard in shards],
            "options": asdict(options),
        }
        _partial(target, "dataset.json").write_text(json.dumps(description, indent=1) + "\n")
        if rejects:
            lines = [json.dumps(asdict(reject)) + "\n" for reject in sorted(rejects, key=lambda r: r.path)]
            _partial(target, "rejects.jsonl").write_text("".join(lines))
    except BaseException:
        _remove_partials(target)
        raise
    _publish(target)
    return Conversion(target, classes, sum(counts.values()), len(rejects))


def _encode_all(
    pictures: Iterable[Picture], options: Options, rejects: list[Reject]
) -> Iterator[tuple[Picture, str, bytes]]:
    """(picture, extension, bytes) of the readable ones; the others go to `rejects`, or raise."""
    for picture in pictures:
        try:
            extension, data = _encode(picture.path, options)
        except ValueError as error:
            if not options.skip_broken:
                raise ValueError(
                    f"{picture.path}: {error}; remove it, or list and leave out such files with --skip-broken"
                ) from error
            rejects.append(Reject(picture.name, str(error)))
            continue
        yield picture, extension, data


def _encode(path: Path, options: Options) -> tuple[str, bytes]:
    """The file's extension by content, and its bytes, after decoding it as a check. Raises ValueError."""
    try:
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


def _write_shard(
    target: Path, name: str, samples: Iterable[tuple[Picture, str, bytes]], counts: dict[str, int]
) -> _Shard:
    # here and not above: webdataset imports torch, seconds that `--help` and a wrong path need not wait
    from webdataset import TarWriter

    label = {class_name: number for number, class_name in enumerate(counts)}
    written = 0
    with open(_partial(target, name), "wb") as file:
        hashing = _HashingFile(file)
        with TarWriter(hashing, encoder=False, mtime=0, user="", group="", format="PAX_FORMAT") as writer:
            for picture, extension, data in samples:
                about = {"class": picture.class_name, "path": picture.name}
                writer.write(
                    {
                        "__key__": picture.key,
                        extension: data,
                        "cls": str(label[picture.class_name]).encode(),
                        "json": json.dumps(about).encode(),
                    }
                )
                counts[picture.class_name] += 1
                written += 1
        file.flush()
        os.fsync(file.fileno())
    return _Shard(name, written, hashing.size, hashing.sha256.hexdigest())


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


def _partial(target: Path, name: str) -> Path:
    return target / f".{name}.partial"


def _remove_partials(target: Path) -> None:
    for path in target.glob(".*.partial"):
        path.unlink()


def _publish(target: Path) -> None:
    """Swap an earlier conversion for the new one; the description comes last, and says that all is there."""
    for path in target.iterdir():
        if _OWN_FILES.fullmatch(path.name) and not path.name.endswith(".partial"):
            path.unlink()
    names = [path.name.removeprefix(".").removesuffix(".partial") for path in target.glob(".*.partial")]
    for name in sorted(names, key="dataset.json".__eq__):
        _partial(target, name).rename(target / name)


def some(names: Sequence[str]) -> str:
    """The first few of many names, for a message."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
