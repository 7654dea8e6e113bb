"""A split of pictures -> WebDataset tars and their `dataset.json`: what every converter shares.

Knows no source's folder layout and no torch. Everything is written under hidden names, shard by shard, in
parallel (`writer`), and renamed when all splits are there: a split that fails leaves nothing behind, and a
conversion that was killed, in whichever split, goes on where it was when it is started again with the same
pictures and options.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import lzma
import multiprocessing
import os
import posixpath
import re
import tarfile
import unicodedata
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from selfmask_dist.common.text import some

from .comparison import Contents, notes_on_classes, notes_on_pair, notes_on_split
from .options import ConversionOptions
from .writer import Picture, Read, RejectedFile, partial_path, write_shard

_OWN_FILES = re.compile(
    r"shard-\d{6}\.tar|dataset\.json|rejects\.jsonl|samples\.index|index_rejects\.jsonl"
    r"|\..*\.(partial|writing|report)"
)
_PLAN = ".plan.report"


@dataclass(frozen=True)
class Conversion:
    """One folder of tars that was written. notes: what a person should know of it. contents: its pictures.

    has_targets: whether they have targets beside one class, of which `classes` are the names.
    """

    folder: Path
    classes: tuple[str, ...]
    num_samples: int
    num_rejected: int
    notes: tuple[str, ...] = ()
    contents: Contents = field(default=(), repr=False, compare=False)
    has_targets: bool = False


def check_target(target: Path, overwrite: bool) -> None:
    """Raise ValueError unless `target` is absent, empty, or an earlier conversion that may be replaced."""
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
    rejects: list[RejectedFile],
    options: ConversionOptions,
    *,
    archive: Path | None = None,
    read: Callable[[Picture], Read] | None = None,
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
        rejects = rejects + [RejectedFile(**reject) for report in reports for reject in report["rejects"]]
        if found < len(pictures):
            met = {name for report in reports for _, _, name in report["contents"]}
            met |= {reject.path for reject in rejects}
            absent = [picture.name for picture in pictures if picture.name not in met]
            if not options.skip_broken or not found:
                raise ValueError(
                    f"{archive}: only {found} of the {len(pictures)} pictures are in it, without"
                    f" {some(absent)}; is it the right archive, and whole? --skip-broken leaves them out"
                )
            rejects += [RejectedFile(name, "listed, and not in the archive") for name in absent]
        conversion = _describe(target, classes, reports, rejects, options)
    except Exception:  # a mistake to mend; after a kill, what is done is still there
        _remove_hidden(target)
        raise
    return conversion


def publish(conversions: list[Conversion]) -> list[Conversion]:
    """Give what `write_split` wrote its visible names, in place of earlier conversions, and return it.

    To be called once every split is there: notes on what they have in common are added; see `comparison`.
    """
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
            partial_path(target, name).rename(target / name)
        _remove_hidden(target)
    return _compare(conversions)


def _compare(conversions: list[Conversion]) -> list[Conversion]:
    trained = next((one.contents for one in conversions if one.folder.name == "train"), None)
    noted = []
    for place, one in enumerate(conversions):
        notes = [*one.notes, *notes_on_split(one.contents)]
        for number, other in enumerate(conversions):
            # once for each pair: beside the split that is not trained on, or comes later
            is_due = other.contents is trained or (number < place and one.contents is not trained)
            if is_due and other is not one:
                notes += notes_on_pair(one.contents, other.folder.name, other.contents)
        if trained is not None and one.contents is not trained:
            notes += notes_on_classes(one.contents, (class_name for _, class_name, _ in trained))
        noted.append(replace(one, notes=tuple(notes)))
    return noted


def _describe(
    target: Path,
    classes: tuple[str, ...],
    reports: list[dict[str, Any]],
    rejects: list[RejectedFile],
    options: ConversionOptions,
) -> Conversion:
    """Write `dataset.json` and `rejects.jsonl`."""
    counts = dict.fromkeys(classes, 0)
    for report in reports:
        for name, count in report["counts"].items():
            counts[name] += count
    shards = [report["shard"] for report in reports if report["shard"] is not None]
    if not shards:
        raise ValueError(f"{target}: none of the {len(rejects)} pictures can be read; {rejects[-1].reason}")
    contents = [tuple(entry) for report in reports for entry in report["contents"]]
    description = {
        "classes": classes,
        "num_samples": len(contents),
        "samples_per_class": counts,
        "shards": shards,
        "options": options.shape,
    }
    partial_path(target, "dataset.json").write_text(json.dumps(description, indent=1) + "\n")
    if rejects:
        lines = [json.dumps(asdict(reject)) + "\n" for reject in sorted(rejects, key=lambda r: r.path)]
        partial_path(target, "rejects.jsonl").write_text("".join(lines))
    num_targets = sum(report.get("targets", 0) for report in reports)
    unlabelled = len(contents) - sum(counts.values()) - num_targets
    notes = (f"{unlabelled} of {len(contents)} pictures have no label",) if unlabelled else ()
    if turned := [name for report in reports for name in report.get("turned", ())]:
        text = f"{len(turned)} pictures have an EXIF orientation, which is not applied in training either"
        notes = (*notes, f"{text}; turn their pixels first where that matters ({some(turned)})")
    return Conversion(target, classes, len(contents), len(rejects), notes, contents, num_targets > 0)


def _write_shards(
    target: Path,
    classes: tuple[str, ...],
    pictures: list[Picture],
    options: ConversionOptions,
    archive: Path | None,
    read: Callable[[Picture], Read] | None,
) -> Iterator[dict[str, Any]]:
    """Yield a report for each shard, in order; the reports of finished shards are read back."""
    size = options.max_samples_per_shard
    label = {name: number for number, name in enumerate(classes)}
    if archive is not None:
        members = _members_of(archive, {member_name(picture.name): picture for picture in pictures})
        number = 0
        while (first := next(members, None)) is not None:
            part = itertools.chain([first], itertools.islice(members, size - 1))
            yield write_shard((target, number, part, label, options))
            deque(part, maxlen=0)  # past those of a shard that was finished before
            number += 1
        return
    if read is not None:
        for number, start in enumerate(range(0, len(pictures), size)):
            loaded = ((picture, read(picture)) for picture in pictures[start : start + size])
            yield write_shard((target, number, loaded, label, options))
        return
    parts = [pictures[start : start + size] for start in range(0, len(pictures), size)]
    jobs = [(target, number, [(p, None) for p in part], label, options) for number, part in enumerate(parts)]
    if options.num_workers <= 1 or len(jobs) == 1:
        yield from map(write_shard, jobs)
        return
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(min(options.num_workers, len(jobs)), mp_context=context) as pool:
        yield from pool.map(write_shard, jobs)


def member_name(name: str) -> str:
    """Return the one form of a path inside a source that lists and archives are compared in."""
    return posixpath.normpath(unicodedata.normalize("NFC", name))


def _members_of(archive: Path, wanted: dict[str, Picture]) -> Iterator[tuple[Picture, Read]]:
    """Yield the wanted pictures of a tar in its own order, with their bytes or why there are none."""
    try:
        with tarfile.open(archive, "r|*") as tar:
            for info in tar:
                name = member_name(info.name)
                if name not in wanted:
                    continue
                picture = wanted.pop(name)  # once: an archive may hold a name twice
                if not info.isreg():
                    yield (
                        picture,
                        "is a link or a special file in the archive; pack it with links followed",
                    )
                elif (file := tar.extractfile(info)) is not None:
                    yield picture, file.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{archive}: damaged or cut short ({error}); fetch it again") from error


def _digest_of_plan(
    classes: tuple[str, ...], pictures: list[Picture], options: ConversionOptions, archive: Path | None
) -> str:
    """What a resumed conversion must have in common with the one that was killed."""
    about = [2, classes, options.shape, str(archive), _stamp(archive)]  # 2: of the reports' form
    digest = hashlib.sha256(json.dumps(about).encode())
    for picture in pictures:
        values = (picture.name, picture.key, picture.class_name, _stamp(picture.path))
        digest.update(repr(values).encode())
        if picture.target is not None:
            digest.update(repr((picture.target, _stamp(picture.label_map))).encode())
    return digest.hexdigest()


def _stamp(path: Path | None) -> tuple[int, int] | None:
    """Return size and time, which tell that a file is still the one it was."""
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
