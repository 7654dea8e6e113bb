"""Pictures on disk -> WebDataset tars and their `dataset.json`: what every converter shares.

A sample is `key.jpg` (the original bytes, unless shrunk), `key.cls` (class number) and `key.json` (class
name, original path). Knows no source's folder layout and no torch. The same pictures give the same bytes
(mtime 0, no owner, fixed order). Everything is written under hidden names, shard by shard, in parallel, and
renamed when all splits are there: a split that fails leaves nothing behind, and a conversion that was killed,
in whichever split, goes on where it was when it is started again with the same pictures and options.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import lzma
import multiprocessing
import os
import re
import tarfile
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypedDict

from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

# by content, not by name; MPO is the JPEG of cameras that append a second picture
_EXTENSION_OF_FORMAT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_OWN_FILES = re.compile(
    r"shard-\d{6}\.tar|dataset\.json|rejects\.jsonl|samples\.index|index_rejects\.jsonl"
    r"|\..*\.(partial|writing|report)"
)
_PLAN = ".plan.report"


class OptionValues(TypedDict, total=False):
    """What every converter takes by name; see `Options`."""

    max_samples_per_shard: int
    short_side: int | None
    quality: int
    skip_broken: bool
    overwrite: bool
    progress: bool
    num_workers: int


@dataclass(frozen=True)
class Options:
    """What every converter can be told.

    short_side: shrink larger pictures to this many pixels (Lanczos, encoded once more, JPEG of `quality`,
        1 to 95); None keeps the original bytes.
    skip_broken: list files that are no readable picture in `rejects.jsonl` and go on, instead of raising.
    overwrite: replace the tars that an earlier conversion left. progress: show a bar.
    num_workers: processes; changes no byte.
    """

    max_samples_per_shard: int = 5000
    short_side: int | None = None
    quality: int = 90
    skip_broken: bool = False
    overwrite: bool = False
    progress: bool = True
    num_workers: int = 1

    @property
    def shape(self) -> dict[str, Any]:
        """Those that change what is written."""
        names = ("max_samples_per_shard", "short_side", "quality", "skip_broken")
        return {name: getattr(self, name) for name in names}

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
    """A file to convert. name: its path inside the source, as recorded in key.json. path: None where it is a
    member of an archive.
    """

    path: Path | None
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


_Job = tuple[Path, int, Iterable[tuple[Picture, bytes | None]], dict[str, int], Options]


def check_target(target: Path, overwrite: bool) -> None:
    """Raises ValueError unless `target` is absent, empty, or an earlier conversion that may be replaced."""
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file; name a folder to write to")
    present = sorted(path.name for path in target.iterdir()) if target.exists() else []
    foreign = [name for name in present if not _OWN_FILES.fullmatch(name)]
    if foreign:
        raise ValueError(f"{target} holds files that no conversion wrote ({some(foreign)}); write elsewhere")
    if not overwrite and any(not name.startswith(".") for name in present):
        raise ValueError(f"{target} is not empty; write elsewhere, or replace what it holds with --overwrite")


def write_split(
    target: Path,
    classes: tuple[str, ...],
    pictures: list[Picture],
    rejects: list[Reject],
    options: Options,
    *,
    archive: Path | None = None,
    read: Callable[[Picture], bytes] | None = None,
) -> Conversion:
    """Convert one split's pictures into the tars and the `dataset.json` of the folder `target`.

    classes: of all splits, in the order of their numbers. rejects: files left out so far.
    archive: a tar (compressed or not) that holds the pictures, by their names; read once, as a stream.
    read: gives a picture's bytes, for pictures that are neither files nor members; in this process.
    The tars' order is pseudo-random and fixed, for readers that shuffle no further than their buffer; from an
    archive it is the archive's.
    Raises ValueError naming a file that is no readable picture, unless `options.skip_broken`.
    """
    if not pictures:
        raise ValueError(f"{target}: there are no pictures to convert")
    pictures = sorted(pictures, key=lambda picture: hashlib.blake2b(os.fsencode(picture.key)).digest())
    target.mkdir(parents=True, exist_ok=True)
    _keep_only_plan(target, _digest_of_plan(classes, pictures, options, archive))
    try:
        with tqdm(total=len(pictures), desc=str(target), unit="img", disable=not options.progress) as bar:
            reports = []
            for report in _write_shards(target, classes, pictures, options, archive, read):
                reports.append(report)
                bar.update(report["pictures"])
        found = sum(report["pictures"] for report in reports)
        if found < len(pictures):
            raise ValueError(
                f"{archive}: only {found} of the {len(pictures)} pictures are in it; is it the right archive,"
                " and whole?"
            )
        rejects = rejects + [Reject(**reject) for report in reports for reject in report["rejects"]]
        conversion = _describe(target, classes, reports, rejects, options)
    except Exception:  # a mistake to mend; after a kill, what is done is still there
        _remove_hidden(target)
        raise
    return conversion


def publish(conversions: list[Conversion]) -> list[Conversion]:
    """Show what `write_split` wrote, once every split is there: swap earlier conversions for the new ones."""
    for conversion in conversions:
        target = conversion.folder
        # the plan goes first, since shards that have their names already could not be gone on with
        (target / _PLAN).unlink()
        for path in target.iterdir():
            if _OWN_FILES.fullmatch(path.name) and not path.name.startswith("."):
                path.unlink()
        names = [path.name.removeprefix(".").removesuffix(".partial") for path in target.glob(".*.partial")]
        # the description comes last, and says that all is there
        for name in sorted(names, key=lambda name: (name == "dataset.json", name)):
            _partial(target, name).rename(target / name)
        _remove_hidden(target)
    return conversions


def _describe(
    target: Path,
    classes: tuple[str, ...],
    reports: list[dict[str, Any]],
    rejects: list[Reject],
    options: Options,
) -> Conversion:
    """Write `dataset.json` and `rejects.jsonl`."""
    counts = dict.fromkeys(classes, 0)
    for report in reports:
        for name, count in report["counts"].items():
            counts[name] += count
    shards = [report["shard"] for report in reports if report["shard"] is not None]
    if not shards:
        raise ValueError(f"{target}: none of the {len(rejects)} pictures can be read; {rejects[-1].reason}")
    description = {
        "classes": classes,
        "num_samples": sum(counts.values()),
        "samples_per_class": counts,
        "shards": shards,
        "options": options.shape,
    }
    _partial(target, "dataset.json").write_text(json.dumps(description, indent=1) + "\n")
    if rejects:
        lines = [json.dumps(asdict(reject)) + "\n" for reject in sorted(rejects, key=lambda r: r.path)]
        _partial(target, "rejects.jsonl").write_text("".join(lines))
    return Conversion(target, classes, sum(counts.values()), len(rejects))


def _write_shards(
    target: Path,
    classes: tuple[str, ...],
    pictures: list[Picture],
    options: Options,
    archive: Path | None,
    read: Callable[[Picture], bytes] | None,
) -> Iterator[dict[str, Any]]:
    """A report for each shard, in order; those of finished shards are read back."""
    size = options.max_samples_per_shard
    label = {name: number for number, name in enumerate(classes)}
    if archive is not None:
        members = _members_of(archive, {picture.name: picture for picture in pictures})
        number = 0
        while (first := next(members, None)) is not None:
            part = itertools.chain([first], itertools.islice(members, size - 1))
            yield _write_shard((target, number, part, label, options))
            deque(part, maxlen=0)  # past those of a shard that was finished before
            number += 1
        return
    if read is not None:
        for number, start in enumerate(range(0, len(pictures), size)):
            loaded = ((picture, read(picture)) for picture in pictures[start : start + size])
            yield _write_shard((target, number, loaded, label, options))
        return
    parts = [pictures[start : start + size] for start in range(0, len(pictures), size)]
    jobs = [(target, number, [(p, None) for p in part], label, options) for number, part in enumerate(parts)]
    if options.num_workers <= 1 or len(jobs) == 1:
        yield from map(_write_shard, jobs)
        return
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(min(options.num_workers, len(jobs)), mp_context=context) as pool:
        yield from pool.map(_write_shard, jobs)


def _members_of(archive: Path, wanted: dict[str, Picture]) -> Iterator[tuple[Picture, bytes]]:
    """The wanted pictures of a tar in its own order, with their bytes."""
    try:
        with tarfile.open(archive, "r|*") as tar:
            for info in tar:
                name = info.name.removeprefix("./")
                if name in wanted and (file := tar.extractfile(info)) is not None:
                    yield wanted.pop(name), file.read()  # once: an archive may hold a name twice
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{archive}: damaged or cut short ({error}); fetch it again") from error


def _write_shard(
    job: _Job,
) -> Any:
    """One shard under its hidden name, and then its report, which says that it is whole."""
    from webdataset import TarWriter  # takes 0.2 s, which --help need not wait for

    target, number, pictures, label, options = job
    name = f"shard-{number:06d}.tar"
    report_path = target / f".{name}.report"
    if report_path.exists():
        return json.loads(report_path.read_text())
    rejects: list[Reject] = []
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
    shard = _Shard(name, counts.total(), hashing.size, hashing.sha256.hexdigest())
    report = {
        "pictures": counts.total() + len(rejects),
        "shard": asdict(shard) if shard.samples else None,
        "counts": counts,
        "rejects": [asdict(reject) for reject in rejects],
    }
    if shard.samples:
        writing.rename(_partial(target, name))
    else:
        writing.unlink()
    temporary = target / f".{name}.report.writing"
    temporary.write_text(json.dumps(report))
    temporary.rename(report_path)
    return report


def _encode_all(
    pictures: Iterable[tuple[Picture, bytes | None]], options: Options, rejects: list[Reject]
) -> Iterator[tuple[Picture, str, bytes]]:
    """(picture, extension, bytes) of the readable ones; the others go to `rejects`, or raise."""
    for picture, data in pictures:
        try:
            extension, encoded = _encode(picture.path, data, options)
        except ValueError as error:
            if not options.skip_broken:
                raise ValueError(
                    f"{picture.path or picture.name}: {error}; remove it, or list and leave out such files"
                    " with --skip-broken"
                ) from error
            rejects.append(Reject(picture.name, str(error)))
            continue
        yield picture, extension, encoded


def _encode(path: Path | None, data: bytes | None, options: Options) -> tuple[str, bytes]:
    """The picture's extension by content, and its bytes, after decoding it as a check. Raises ValueError."""
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


def _partial(target: Path, name: str) -> Path:
    return target / f".{name}.partial"


def _digest_of_plan(
    classes: tuple[str, ...], pictures: list[Picture], options: Options, archive: Path | None
) -> str:
    """What a resumed conversion must have in common with the one that was killed."""
    about = [classes, options.shape, str(archive), _stamp(archive)]
    digest = hashlib.sha256(json.dumps(about).encode())
    for picture in pictures:
        values = (picture.name, picture.key, picture.class_name, _stamp(picture.path))
        digest.update(repr(values).encode())
    return digest.hexdigest()


def _stamp(path: Path | None) -> tuple[int, int] | None:
    """What tells that a file is still the one it was."""
    stat = path.stat() if path is not None else None
    return (stat.st_size, stat.st_mtime_ns) if stat is not None else None


def _keep_only_plan(target: Path, digest: str) -> None:
    """Keep the finished shards of a killed conversion, if it was this one; remove everything else hidden."""
    plan = target / _PLAN
    is_same = plan.exists() and plan.read_text() == digest
    _remove_hidden(target, ".writing" if is_same else "")
    plan.write_text(digest)


def _remove_hidden(target: Path, ending: str = "") -> None:
    for path in target.glob(f".*{ending}"):
        if _OWN_FILES.fullmatch(path.name):
            path.unlink()


def some(names: Sequence[str]) -> str:
    """The first few of many names, for a message."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
