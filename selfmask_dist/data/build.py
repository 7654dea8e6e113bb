"""Making, checking and describing the saved index: what `selfmask data index | verify | stats` do.

Reads every byte of every shard once, in parallel over shards. What cannot be used is left out, listed in
`index_rejects.jsonl` with shard, key and reason, and counted against a budget:

    rejected samples <= budget * all samples,  or no index is written and nothing starts.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from selfmask_dist.common.class_names import normal_name
from selfmask_dist.common.files import write_text
from selfmask_dist.common.pictures import EXTENSION_OF_FORMAT, NoPictureError, check_shape, open_picture
from selfmask_dist.common.text import some
from selfmask_dist.data.indexing.index import INDEX_NAME, Index, Similar, index_of_table
from selfmask_dist.data.indexing.manifest import MANIFEST_NAME, Manifest, find_shards, read_manifest
from selfmask_dist.data.indexing.table import SampleTable
from selfmask_dist.data.indexing.tar import Problem
from selfmask_dist.data.source import (
    READ_TOGETHER,
    SampleError,
    TarSource,
    common_folder,
    index_path,
    open_source,
)
from selfmask_dist.data.splits import count_labels
from selfmask_dist.data.views.decode import decode

REJECTS_NAME = "index_rejects.jsonl"


@dataclass(frozen=True)
class Reject:
    """A line of the rejects file. is_lost: False for a remark about a sample that is used."""

    shard: str
    key: str
    reason: str
    is_lost: bool = True


@dataclass(frozen=True)
class BuiltIndex:
    """An index that was written, and what was found on the way."""

    path: Path
    index: Index
    rejects: tuple[Reject, ...]


def build_index(
    path: str | Path,
    *,
    decode_check: bool = True,
    budget: float = 0.001,
    num_workers: int = 1,
    classes: Sequence[str] | None = None,
    require_labels: bool = True,
    similar: Similar = "refuse",
) -> BuiltIndex:
    """Walk, read and check all shards of a folder (or one tar), and write the index beside them.

    decode_check: decode every picture; False checks only that each starts like one (ten times faster).
    budget: share of the samples that may be unusable.
    classes: names in the order of their numbers, where no dataset.json lists them.
    require_labels: False takes samples without a label, and looks at no label that is there.
    similar: what class folders are whose names differ only by case, width or the like: an error that names
        them, one class ("merge"), or as many as there are names ("keep").
    Raises ValueError where more than the budget is unusable, with the first ones named, after writing the
    rejects file; where there are no shards; where `path` is a pattern.
    """
    path = os.path.expanduser(path)
    shards, target = find_shards(path), index_path(path)
    if target is None:
        raise ValueError(f"{path} is a pattern; an index belongs to a folder of tars, or to one tar")
    manifest = _manifest_of(shards)
    table, rejects = _scan(shards, decode_check, num_workers, require_labels)
    _hold_against_manifest(shards, manifest, table, rejects)
    index = index_of_table(
        table,
        shards,
        folder=common_folder(shards),
        classes=manifest.classes or _checked_classes(classes),
        has_crc32=True,
        similar=similar if require_labels else "keep",
    )
    rejects += _lost_classes(index, rejects)
    index = _drop_bad_labels(index, rejects, require_labels)
    rejects += _several_labels(index)
    _write_rejects(target, rejects)
    lost = {(reject.shard, reject.key) for reject in rejects if reject.is_lost}
    total = len(index) + len(lost)
    if not len(index) or len(lost) > budget * total:
        named = some(
            [f"{reject.shard}: {reject.key!r} {reject.reason}" for reject in rejects if reject.is_lost]
        )
        raise ValueError(
            f"{path}: {len(lost)} of {total} samples cannot be used, more than the budget of {budget:g};"
            f" all are listed in {rejects_path(target)}; {named or 'no pictures in it'}."
            " Mend the data, or raise the budget (--budget) where losing them is right"
        )
    index.save(target)
    return BuiltIndex(target, index, tuple(rejects))


def _checked_classes(classes: Sequence[str] | None) -> tuple[str, ...] | None:
    names = tuple(normal_name(name) for name in classes or ())
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"the list of classes names {some(twice)} twice; name each class once")
    return names or None


def _lost_classes(index: Index, rejects: Sequence[Reject]) -> list[Reject]:
    """Return a remark for each class folder of which no picture is left."""
    folders = {normal_name(reject.key.rpartition("/")[0]) for reject in rejects if reject.is_lost}
    lost = sorted(folders - {"", *(index.folders or ())}) if index.folders is not None else []
    return [Reject("", name, "is a class of which no picture can be used", is_lost=False) for name in lost]


def _several_labels(index: Index) -> list[Reject]:
    """Return a remark where the same bytes are there under several labels, by length and crc32."""
    contents = index.length.astype(np.uint64) << np.uint64(32) | index.crc32.astype(np.uint64)
    order = np.lexsort((index.label, contents))
    same = contents[order][1:] == contents[order][:-1]
    labelled = (index.label[order][:-1] >= 0) & (index.label[order][1:] != index.label[order][:-1])
    places = np.flatnonzero(same & labelled)
    if not len(places):
        return []
    shown = [" and ".join(index.where(int(order[i + k])) for k in (0, 1)) for i in places.tolist()[:6]]
    reason = f"{len(places)} pictures are there under several labels, byte for byte: {some(shown)}"
    return [Reject("", "", reason, is_lost=False)]


def rejects_path(index_file: Path) -> Path:
    """Return the path of the file that lists the rejects of an index."""
    whole_folder = index_file.name == INDEX_NAME
    return index_file.with_name(REJECTS_NAME if whole_folder else f"{index_file.name}_rejects.jsonl")


def verify(path: str | Path, *, num_workers: int = 1) -> list[str]:
    """Read every sample and return a message for each whose bytes are not those that were indexed.

    Raises ValueError where the tars have no saved index.
    """
    source = open_source(path, require_labels=False)
    if not source.index.has_crc32:
        raise ValueError(f"{path} has no index to verify; make one with: selfmask data index {path}")
    parts = np.array_split(np.arange(len(source)), max(1, min(num_workers * 4, len(source))))
    with closing(source):
        return [
            line
            for found in _map(_verify_rows, [(source, part) for part in parts], num_workers)
            for line in found
        ]


def describe(path: str | Path) -> str:
    """Return the counts, sizes and classes of the data set at `path`, as lines for people."""
    source = open_source(path, require_labels=False)
    index = source.index
    lengths = index.length.astype(np.int64)
    missing, counts = np.split(count_labels(source), [1])
    lines = [
        f"samples     {len(index):,} in {len(index.shards)} shards, {lengths.sum() / 2**20:,.1f} MiB",
        f"picture     {lengths.min():,} to {lengths.max():,} bytes, {lengths.mean():,.0f} on average",
        f"labels      {len(index) - int(missing[0]):,} of {len(index):,}, {len(source.classes)} classes",
        f"checksums   {'yes' if index.has_crc32 else 'no (no saved index)'}",
        f"left out    {index.num_rejected}",
    ]
    if index.caption_length is not None:
        lines.insert(3, f"captions    {int((index.caption_length > 0).sum()):,} of {len(index):,}")
    if len(counts):
        rare, common = int(counts.argmin()), int(counts.argmax())
        lines.insert(
            3,
            f"per class   {counts[rare]} ({source.classes[rare]}) to {counts[common]}"
            f" ({source.classes[common]})",
        )
    return "\n".join(lines)


def _manifest_of(shards: list[Path]) -> Manifest:
    """Return the description beside the shards. Sizes may differ here: the walk says what is damaged."""
    try:
        return read_manifest(shards, whole_folder=False)
    except ValueError as error:
        if "promises" not in str(error):
            raise
        path = shards[0].parent / MANIFEST_NAME
        values = json.loads(path.read_text(encoding="utf-8"))
        return Manifest(
            tuple(values["classes"]),
            {shards[0].parent / entry["name"]: int(entry["samples"]) for entry in values["shards"]},
        )


def _hold_against_manifest(
    shards: list[Path], manifest: Manifest, table: SampleTable, rejects: list[Reject]
) -> None:
    """Note the samples that are gone without a trace: a shard that was cut exactly at a header looks whole,
    and has fewer samples than were packed.
    """
    found = np.bincount(np.array(table.shard, dtype=np.int64), minlength=len(shards))
    folder = common_folder(shards)
    absent = sorted(manifest.samples.keys() - set(shards)) if len({s.parent for s in shards}) == 1 else []
    for shard in absent:
        rejects += [
            Reject(shard.name, f"#{n}", "its shard is missing") for n in range(manifest.samples[shard])
        ]
    named = Counter(
        shard for shard, _ in {(reject.shard, reject.key) for reject in rejects if reject.is_lost}
    )
    for number, shard in enumerate(shards):
        name = os.path.relpath(shard, folder)
        lost = manifest.samples.get(shard, 0) - int(found[number]) - named[name]
        reason = f"{MANIFEST_NAME} promises {manifest.samples.get(shard)} samples of this shard"
        rejects += [Reject(name, f"#{n}", reason) for n in range(lost)]


def _drop_bad_labels(index: Index, rejects: list[Reject], require_labels: bool) -> Index:
    bad: dict[int, str] = {}
    if require_labels:
        lacks = (index.label < 0) & ~index.targets.present(len(index))
        bad |= {int(row): "has no label" for row in np.flatnonzero(lacks)}
    if require_labels and index.classes is not None and index.folders is None:
        outside = np.flatnonzero(index.label >= len(index.classes))
        bad |= {
            int(row): f"has label {index.label[row]}, and there are only {len(index.classes)} classes"
            for row in outside
        }
    if require_labels and index.classes is not None and index.folders is not None:
        known = {normal_name(name) for name in index.classes}
        foreign = [n for n, name in enumerate(index.folders) if name not in known]
        bad |= {
            int(row): f"is of class {index.folders[index.label[row]]!r}, which is not among the classes"
            for row in np.flatnonzero(np.isin(index.label, foreign))
        }
    for row, reason in sorted(bad.items()):
        rejects.append(Reject(index.shards[index.shard[row]].name, index.key(row), reason))
    keep = np.ones(len(index), dtype=bool)
    keep[list(bad)] = False
    lost = {(reject.shard, reject.key) for reject in rejects if reject.is_lost}
    return index.keep(keep, num_rejected=len(lost))


def _scan(
    shards: list[Path], decode_check: bool, num_workers: int, require_labels: bool
) -> tuple[SampleTable, list[Reject]]:
    folder = common_folder(shards)
    whole = SampleTable()
    rejects: list[Reject] = []
    jobs = [(number, shard, decode_check, require_labels) for number, shard in enumerate(shards)]
    scans = _map(_scan_shard, jobs, num_workers)
    for shard, (table, problems) in zip(shards, scans, strict=True):
        whole.extend(table)
        name = os.path.relpath(shard, folder)
        rejects += [Reject(name, problem.key, problem.reason, problem.is_lost) for problem in problems]
    return whole, rejects


def _scan_shard(job: tuple[int, Path, bool, bool]) -> tuple[SampleTable, list[Problem]]:
    number, shard, decode_check, require_labels = job
    table = SampleTable(require_labels=require_labels)
    problems: list[Problem] = []
    table.add_shard(number, shard, problems=problems, check=_decodes if decode_check else _starts_well)
    if not len(table) and not problems:
        problems = [Problem("", "no pictures in it")]
    return table, problems


def _starts_well(extension: str, data: bytes) -> str | None:
    """Return a remark where the name promises another kind. Raises ValueError where it is no picture."""
    try:
        image = open_picture(data)
    except NoPictureError:
        raise ValueError("is no picture by its first bytes") from None
    check_shape(image.size)  # no view can be made of it
    promised = Image.registered_extensions().get(f".{extension}")
    kind = EXTENSION_OF_FORMAT.get(str(image.format), str(image.format))
    if promised is None or EXTENSION_OF_FORMAT.get(promised, promised) == kind:
        return None
    return f"is named .{extension} and is {kind} inside; it is read by its content"


def _decodes(extension: str, data: bytes) -> str | None:
    remark = _starts_well(extension, data)
    decode(data)
    return remark


def _map(fn: Any, jobs: Sequence[Any], num_workers: int) -> Iterator[Any]:
    if num_workers <= 1 or len(jobs) <= 1:
        yield from map(fn, jobs)
        return
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(min(num_workers, len(jobs)), mp_context=context) as pool:
        yield from pool.map(fn, jobs)


def _verify_rows(job: tuple[TarSource, np.ndarray]) -> list[str]:
    source, rows = job
    return [
        str(data)
        for start in range(0, len(rows), READ_TOGETHER)
        for data in source.read_many(rows[start : start + READ_TOGETHER])
        if isinstance(data, SampleError)
    ]


def _write_rejects(target: Path, rejects: list[Reject]) -> None:
    path = rejects_path(target)
    if not rejects:
        path.unlink(missing_ok=True)
        return
    write_text(path, "".join(json.dumps(asdict(reject)) + "\n" for reject in rejects))
