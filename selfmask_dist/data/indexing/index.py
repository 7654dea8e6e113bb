"""The index of a data set: where each sample's bytes lie, its label and checksum, in one memory-mapped file.

Knows neither pictures nor paths beyond the shards' names. Row i is

    (shard, offset, length, label, crc32, end of its key),  28 bytes, and the key itself,

and the file is mapped, not read: opening it costs the same for a thousand samples and for millions. What a
resume must find unchanged is its `identity`: a few digests, so that a difference can be named.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from selfmask_dist.common.class_names import similar_names, similar_text
from selfmask_dist.common.files import replacing
from selfmask_dist.data.indexing.table import SampleTable
from selfmask_dist.data.indexing.targets import IndexTargets, read_columns

INDEX_NAME = "samples.index"
Similar = Literal["refuse", "merge", "keep"]  # what is done with classes whose names look like one
_MAGIC = b"selfmask index 1\n"
_ALIGN = 64
_COLUMNS: dict[str, str] = {
    "shard": "<i4",
    "offset": "<i8",
    "length": "<u4",
    "label": "<i4",
    "crc32": "<u4",
    "key_end": "<u4",
}
_CAPTIONS: dict[str, str] = {"caption_offset": "<i8", "caption_length": "<u4"}  # where any sample has one


@dataclass(frozen=True)
class Shard:
    """A tar as it was when it was indexed. name: without its folder. size: bytes."""

    name: str
    size: int


@dataclass(frozen=True)
class Index:
    """All samples of a data set, one per row.

    label: a class number, or the place in `folders` where these are given; -1 = none.
    crc32: of the pictures, zeros where `has_crc32` is False (headers alone were read).
    classes: names in the order of their numbers, None where no description lists them.
    caption_offset, caption_length: of the sample's `.txt` in its shard, 0 and 0 where it has none; None where
        no sample has one.
    targets: what samples are trained towards beside one class.
    """

    shards: tuple[Shard, ...]
    shard: npt.NDArray[np.int32]
    offset: npt.NDArray[np.int64]
    length: npt.NDArray[np.uint32]
    label: npt.NDArray[np.int32]
    crc32: npt.NDArray[np.uint32]
    key_end: npt.NDArray[np.uint32]
    keys: npt.NDArray[np.uint8]
    folders: tuple[str, ...] | None
    classes: tuple[str, ...] | None
    has_crc32: bool
    num_rejected: int = 0

    path: Path | None = None  # the file that this one is mapped from
    caption_offset: npt.NDArray[np.int64] | None = None
    caption_length: npt.NDArray[np.uint32] | None = None
    targets: IndexTargets = field(default_factory=IndexTargets)

    def __len__(self) -> int:
        return len(self.offset)

    def __reduce__(self) -> Any:
        # to a worker goes the file's name: it maps the same pages, which are in memory once for all
        if self.path is not None:
            return load_index, (self.path,)
        return Index, tuple(getattr(self, each.name) for each in fields(self))

    def key(self, row: int) -> str:
        """Return the WebDataset key of the sample at `row`."""
        start = int(self.key_end[row - 1]) if row > 0 else 0
        return self.keys[start : int(self.key_end[row])].tobytes().decode(errors="surrogateescape")

    @property
    def has_captions(self) -> bool:
        """Whether any sample has a caption."""
        return self.caption_length is not None

    @property
    def _columns(self) -> dict[str, str]:
        return _COLUMNS | (_CAPTIONS if self.has_captions else {})

    def where(self, row: int) -> str:
        """Return the names of shard and sample, for messages."""
        return f"{self.shards[self.shard[row]].name}: sample {self.key(row)!r}"

    def keep(self, rows: npt.NDArray[np.bool_], *, num_rejected: int) -> Index:
        """Return an index of the rows where `rows`, of shape (len,), is true."""
        ends = self.key_end.astype(np.int64)
        lengths = ends - np.append(0, ends)[:-1]
        columns = {name: getattr(self, name)[rows] for name in self._columns if name != "key_end"}
        return replace(
            self,
            **columns,
            key_end=np.cumsum(lengths[rows], dtype=np.uint32),
            keys=self.keys[np.repeat(rows, lengths)],
            num_rejected=num_rejected,
            path=None,
            targets=self.targets.keep(rows),
        )

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What a resume must find unchanged: counts, and digests of names, places, labels and contents."""
        names = json.dumps([asdict(shard) for shard in self.shards]).encode()
        # of the same number types, whether these were walked or mapped
        columns = self._as_stored()
        places = [columns[name] for name in ("shard", "offset", "length", "key_end")]
        captions = {"captions": _digest(*(columns[name] for name in _CAPTIONS))} if self.has_captions else {}
        targets = {"targets": self.targets.digest()} if self.targets else {}
        return (
            captions
            | targets
            | {
                "samples": len(self),
                "shards": _digest(names),
                "places": _digest(*places, self.keys),
                "labels": _digest(columns["label"], json.dumps(self.folders).encode()),
                "contents": _digest(columns["crc32"]) if self.has_crc32 else None,
            }
        )

    def _as_stored(self) -> dict[str, npt.NDArray[Any]]:
        return {name: np.ascontiguousarray(getattr(self, name), kind) for name, kind in self._columns.items()}

    def save(self, path: Path) -> None:
        """Write the index to `path`, whole or not at all, and force it to the disk."""
        columns = self._as_stored()
        columns["keys"] = np.ascontiguousarray(self.keys)
        header = json.dumps(
            {
                "shards": [[shard.name, shard.size] for shard in self.shards],
                "samples": len(self),
                "key_bytes": len(self.keys),
                "folders": self.folders,
                "classes": self.classes,
                "has_crc32": self.has_crc32,
                "has_captions": self.has_captions,
                "num_rejected": self.num_rejected,
                **({"targets": self.targets.describe()} if self.targets else {}),
                "identity": self.identity,
            }
        ).encode()
        with replacing(path, sync=True) as partial, open(partial, "wb") as file:
            file.write(_MAGIC + len(header).to_bytes(8, "little") + header)
            for column in [*columns.values(), *self.targets.columns()]:
                file.write(bytes(-file.tell() % _ALIGN))
                file.write(column.tobytes())


def index_of_table(
    table: SampleTable,
    shards: Sequence[Path],
    *,
    folder: Path,
    classes: tuple[str, ...] | None,
    has_crc32: bool,
    similar: Similar = "keep",
) -> Index:
    """Return the index of a walk's result, with labels by number where any sample has one, else by folder.

    folder: where shards are named from. similar: what folders are whose names look like one class.
    Raises ValueError naming them, with "refuse", unless `classes` lists them all.
    """
    numbers = np.array(table.number, dtype=np.int32)
    folders: tuple[str, ...] | None = None
    if not (numbers >= 0).any() and table.folders:
        of_folder = _classes_of_folders(table, folder, classes or (), similar)
        folders = tuple(sorted(set(of_folder)))
        place = {name: number for number, name in enumerate(folders)}
        # a sample without a folder has -1, which takes the last place
        numbers = np.array([*(place[name] for name in of_folder), -1], dtype=np.int32)[
            np.array(table.folder, dtype=np.int64)
        ]
    return Index(
        shards=tuple(Shard(os.path.relpath(path, folder), path.stat().st_size) for path in shards),
        shard=np.array(table.shard, dtype=np.int32),
        offset=np.array(table.offset, dtype=np.int64),
        length=np.array(table.length, dtype=np.uint32),
        label=numbers,
        crc32=np.array(table.crc32, dtype=np.uint32),
        key_end=np.array(table.key_end, dtype=np.uint32),
        keys=np.frombuffer(bytes(table.keys), dtype=np.uint8),
        folders=folders,
        classes=classes,
        has_crc32=has_crc32,
        **_captions_of(table),
        targets=table.targets.finish(),
    )


def _classes_of_folders(
    table: SampleTable, where: Path, classes: Sequence[str], similar: Similar
) -> list[str]:
    """Return the class of each of the table's folders."""
    groups = [group for group in similar_names(table.folders) if not set(group) <= set(classes)]
    if similar == "keep" or not groups:
        return list(table.folders)
    if similar == "refuse":
        raise ValueError(
            f"{where}: folders have names that look like one class ({similar_text(groups)}); say what they"
            " are with: selfmask data index --similar-classes merge, or keep"
        )
    counts = np.bincount(np.array(table.folder, dtype=np.int64) + 1, minlength=len(table.folders) + 1)[1:]
    # the spelling that most samples have; of equals the first by name
    chosen = {
        name: min(group, key=lambda one: (-int(counts[table.folders[one]]), one))
        for group in groups
        for name in group
    }
    return [chosen.get(name, name) for name in table.folders]


def _captions_of(table: SampleTable) -> dict[str, Any]:
    if not any(table.caption_length):
        return {}
    return {
        "caption_offset": np.array(table.caption_offset, dtype=np.int64),
        "caption_length": np.array(table.caption_length, dtype=np.uint32),
    }


def load_index(path: Path) -> Index:
    """Map a saved index and return it. Raises ValueError naming a file that is none, or was cut short."""
    try:
        # a plain array over the mapping: each indexing of a memmap costs microseconds
        data = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
        start = len(_MAGIC) + 8
        if bytes(data[: len(_MAGIC)]) != _MAGIC:
            raise ValueError("it does not start like one")
        length = int.from_bytes(bytes(data[len(_MAGIC) : start]), "little")
        header = json.loads(bytes(data[start : start + length]))
        at, columns = start + length, {}
        kinds = _COLUMNS | (_CAPTIONS if header.get("has_captions") else {})  # older indices do not say it
        for name, kind in kinds.items():
            columns[name], at = _map(data, at, np.dtype(kind), header["samples"])
        keys, at = _map(data, at, np.dtype(np.uint8), header["key_bytes"])

        def take(kind: str, count: int) -> npt.NDArray[Any]:
            nonlocal at
            column, at = _map(data, at, np.dtype(kind), count)
            return column

        targets = read_columns(header.get("targets", {}), header["samples"], take)
        if at != len(data):
            raise ValueError(f"it has {len(data)} bytes and not {at}")
        index = Index(
            shards=tuple(Shard(name, size) for name, size in header["shards"]),
            **columns,
            keys=keys,
            folders=None if header["folders"] is None else tuple(header["folders"]),
            classes=None if header["classes"] is None else tuple(header["classes"]),
            has_crc32=header["has_crc32"],
            num_rejected=header["num_rejected"],
            path=path,
            targets=targets,
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: not a readable index ({error}); make it again with: selfmask data index {path.parent}"
        ) from error
    index.__dict__["identity"] = header["identity"]  # hashing 2.7 million rows again would cost a second
    return index


def difference(then: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Return in words how two identities differ; None where they are the same data.

    Contents are compared only where both have checksums.
    """
    if then["samples"] != now["samples"]:
        return f"it had {then['samples']} samples and has {now['samples']}"
    what = {
        "shards": "its shards have other names or sizes",
        "places": "its samples have other keys or places",
        "labels": "its labels changed",
        "contents": "the bytes of its pictures changed (their checksums differ)",
        "captions": "its captions have other places or lengths",
        "targets": "its lists of labels, numbers or label maps changed",
    }
    changed = [
        text
        for name, text in what.items()
        if then.get(name) != now.get(name) and None not in (then.get(name), now.get(name))
    ]
    return "; ".join(changed) or None


def _map(
    data: npt.NDArray[np.uint8], at: int, kind: np.dtype[Any], count: int
) -> tuple[npt.NDArray[Any], int]:
    at += -at % _ALIGN
    end = at + count * kind.itemsize
    if end > len(data):
        raise ValueError(f"it was cut short at {len(data)} bytes")
    return data[at:end].view(kind), end


def _digest(*parts: npt.NDArray[Any] | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).data)
    return digest.hexdigest()[:16]
