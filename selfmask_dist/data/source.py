"""Samples by number from WebDataset tars: an index of offsets, and a read of just those bytes.

Knows neither order, epochs, ranks nor pixels. `Source` is what the rest of the package sees; `TarSource` is
the reader behind it, with

    read(i) = pread(shard[i], length[i], offset[i]),  of which the crc32 must be the index's,

for many samples in one call.

A saved index (`selfmask data index`) is mapped; without one the tars' headers are walked at each start, and
there are no checksums. A `dataset.json` beside the tars, as data_prep writes it, names the classes.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from selfmask_dist.common.files import write_bytes
from selfmask_dist.common.text import some
from selfmask_dist.data.indexing.index import INDEX_NAME, Index, index_of_table, load_index
from selfmask_dist.data.indexing.labels import Labels, resolve_labels
from selfmask_dist.data.indexing.manifest import MANIFEST_NAME, find_shards, read_manifest, sizes_of
from selfmask_dist.data.indexing.patterns import expand, is_pattern, written
from selfmask_dist.data.indexing.table import SampleTable, crc32_of
from selfmask_dist.data.remote import CachedStorage, RangeStorage, fetch_bytes, is_remote
from selfmask_dist.data.storage import LocalStorage, Storage

Rows = npt.NDArray[Any]
READ_TOGETHER = 64  # pictures in one `read_many`: what bounds the encoded bytes in memory


class SampleError(ValueError):
    """One sample cannot be read or decoded; the message names its shard and key."""


@dataclass(frozen=True)
class Sample:
    """An encoded picture. label: class number, -1 where there is none. key: unique within its shard."""

    data: bytes
    label: int
    key: str


class Source(Protocol):
    """Numbered samples. Picklable, and safe to read from any process that received it."""

    classes: tuple[str, ...]  # empty where nothing is labelled

    def __len__(self) -> int: ...
    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """The labels of all samples, (len,), -1 = none: 8 bytes a sample, of this process."""
        ...

    def labels_of(self, indices: npt.NDArray[np.int64] | slice) -> npt.NDArray[np.int64]:
        """Return the labels of the samples `indices`, without those of the others."""
        ...

    def key(self, index: int) -> str:
        """Return the sample's key, which is unique within its shard."""
        ...

    def where(self, index: int) -> str:
        """Return the names of shard and sample, for messages."""
        ...

    @property
    def identity(self) -> dict[str, Any]:
        """What a resume must find unchanged; see `index.difference`."""
        ...

    def read_many(self, indices: npt.NDArray[np.int64]) -> list[bytes | SampleError]:
        """Return the encoded picture of each of the samples `indices`, or why it cannot be had.

        It is ten times as fast as reading one by one.
        """
        ...

    def read(self, index: int) -> Sample:
        """Return one sample. Raises SampleError where its bytes cannot be had."""
        ...

    @property
    def has_captions(self) -> bool:
        """Whether any sample has a caption, the text of its `.txt` member."""
        ...

    def read_captions(self, indices: npt.NDArray[np.int64]) -> list[str | SampleError]:
        """Return the caption of each of the samples `indices`, or why there is none; needs `has_captions`."""
        ...


def open_source(
    path: str | Path | Sequence[str | Path],
    *,
    classes: Sequence[str] | None = None,
    require_labels: bool = True,
    cache: str | Path | None = None,
    cache_bytes: int = 100 * 2**30,
    trust_index: bool = False,
) -> TarSource:
    """Return a source over a folder of `*.tar` files, one tar, a pattern or a list; shards by name.

    path: may hold braces and glob signs (`{000000..000041}.tar`, `*.tar`; see `indexing.patterns`), or be the
        address of a remote folder (s3://..., https://...) that holds its index, or of tars in it. On this
        machine an index is used where the path is one folder or one tar.
    cache: folder on this node for the remote tars' copies, at most `cache_bytes`; without it, samples are
        read in ranges.

    classes: the class list to number by, for a split that may lack classes: pass the training source's
        `classes`.
    trust_index: do not hold a saved index against its folder, which costs a `stat` a shard: for all processes
        of a run but one. A shard that is not as it was indexed is then noticed when it is first read.
    require_labels: False is for training that reads none: a sample without a label has -1, and so has one
        whose label is no number, or is not of the class list.
    Raises ValueError naming shard, key and the way out: nothing found, a damaged shard, a sample without
    picture or label, a label that the class list does not have, an index that does not fit its tars.
    """
    path = written(path)
    if is_remote(path):
        return _open_remote(path.rstrip("/"), classes, require_labels, cache, cache_bytes)
    path = os.path.expanduser(path)
    saved = index_path(path)
    if saved is not None and saved.is_file():
        index, folder = load_index(saved), saved.parent
        if not trust_index:
            _check_fits(index, path, saved)
        paths = [folder / shard.name for shard in index.shards]
        storage = LocalStorage(paths, sizes=[shard.size for shard in index.shards])
    else:
        shards = find_shards(path)
        index = walk_shards(path, shards, require_labels=require_labels)
        folder, storage = common_folder(shards), LocalStorage(shards)
    names, labels = resolve_labels(index, str(folder), classes=classes, require_labels=require_labels)
    return TarSource(index, folder, storage, labels, names)


def _open_remote(
    url: str,
    classes: Sequence[str] | None,
    require_labels: bool,
    cache: str | Path | None,
    cache_bytes: int,
) -> TarSource:
    """Open a remote folder. Its index is small: it is copied to this node, and mapped there."""
    url, wanted = _folder_of(url)
    content = fetch_bytes(f"{url}/{INDEX_NAME}")
    folder = Path(cache) if cache is not None else Path(tempfile.gettempdir())
    folder.mkdir(parents=True, exist_ok=True)
    local = folder / f".{hashlib.sha256(content).hexdigest()[:16]}.index"
    if not local.exists():
        write_bytes(local, content)
    index = _only(load_index(local), wanted, url)
    urls = [f"{url}/{shard.name}" for shard in index.shards]
    storage: Storage = RangeStorage(urls)
    if cache is not None:
        sizes = [shard.size for shard in index.shards]
        storage = CachedStorage(urls, sizes, folder=cache, max_bytes=cache_bytes)
    names, labels = resolve_labels(index, url, classes=classes, require_labels=require_labels)
    return TarSource(index, url, storage, labels, names)


def _folder_of(url: str) -> tuple[str, list[str]]:
    """Return the remote folder that an address means, and patterns of the tars in it; none for all of them.

    Raises:
        ValueError: it means tars of several folders, whose indices are several too.
    """
    if not is_pattern(url) and not url.endswith(".tar"):
        return url, []
    parts = [part.rstrip("/").rpartition("/") for part in expand(url)]
    folders = sorted({folder for folder, _, _ in parts})
    if len(folders) > 1 or is_pattern(folders[0]) or not all(name.endswith(".tar") for _, _, name in parts):
        raise ValueError(
            f"{url}: of tars that are elsewhere, name one folder, which holds their index, or tars of one "
            f"folder (s3://bucket/pets/a-{{000..041}}.tar); copy others into one, and index it"
        )
    return folders[0], [name for _, _, name in parts]


def _only(index: Index, wanted: Sequence[str], url: str) -> Index:
    """Return the part of an index that is of the tars which patterns name; without patterns, all of it."""
    if not wanted:
        return index
    names = [shard.name for shard in index.shards]
    chosen = {pattern: fnmatch.filter(names, pattern) for pattern in wanted}
    if absent := [pattern for pattern, found in chosen.items() if not found]:
        raise ValueError(f"{url}: no tar of its index is called {some(absent)}; there are {some(names)}")
    taken = {name for found in chosen.values() for name in found}
    is_taken = np.array([name in taken for name in names])
    return index.keep(is_taken[index.shard], num_rejected=index.num_rejected)


def index_path(path: str) -> Path | None:
    """Return where the saved index of `path` lies: in the folder, or beside one tar; None for a pattern."""
    if os.path.isdir(path):
        return Path(path) / INDEX_NAME
    return Path(f"{path}.index") if os.path.isfile(path) else None


def common_folder(shards: Sequence[Path]) -> Path:
    """Return the folder that shards are named from."""
    return Path(os.path.commonpath([shard.parent for shard in shards]))


def walk_shards(path: str, shards: list[Path], *, require_labels: bool = True) -> Index:
    """Return the index that headers alone give, without checksums. Raises ValueError at the first damage."""
    manifest = read_manifest(shards, whole_folder=os.path.isdir(path))
    table = SampleTable(require_labels=require_labels)
    for number, shard in enumerate(shards):
        before = len(table)
        table.add_shard(number, shard)
        found, promised = len(table) - before, manifest.samples.get(shard)
        if found == 0:
            raise ValueError(f"{shard}: no pictures in it; move it away")
        if promised is not None and promised != found:
            raise ValueError(
                f"{shard}: holds {found} samples, {MANIFEST_NAME} promises {promised}; convert again"
            )
    return index_of_table(
        table,
        shards,
        folder=common_folder(shards),
        classes=manifest.classes,
        has_crc32=False,
        similar="refuse" if require_labels else "keep",
    )


def check_same_classes(train: Source, test: Source) -> None:
    """Raise ValueError unless both sources number the same classes in the same way."""
    if train.classes == test.classes:
        return
    lacking = sorted(set(train.classes) - set(test.classes))
    extra = sorted(set(test.classes) - set(train.classes))
    detail = "; ".join(
        f"{what} has no {some(names)}" for what, names in (("test", lacking), ("train", extra)) if names
    )
    raise ValueError(
        f"train has {len(train.classes)} classes and test {len(test.classes)}, numbered differently"
        f" ({detail or 'same names, other order'}); open the test data with classes=train.classes"
    )


class TarSource:
    """Reads the pictures of tars in any order; see `open_source`, and `Source` for what each method returns.

    A sample takes 28 bytes and its key, all of it the mapped file, which is in memory once for all processes.

    verify: hold each picture against the index's crc32, where it has one (a third of a microsecond for
        each KB, and a tenth of that with the package isal).
    """

    verify = True

    def __init__(
        self,
        index: Index,
        folder: Path | str,
        storage: Storage,
        labels: Labels,
        classes: tuple[str, ...],
    ) -> None:
        self.classes = classes
        self._labels = labels
        self._all_labels: npt.NDArray[np.int64] | None = None
        self.index = index
        self.folder = folder
        self._storage = storage

    def __len__(self) -> int:
        return len(self.index)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_all_labels": None}  # a worker looks up the few that it needs

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        if self._all_labels is None:
            self._all_labels = self._labels.of(slice(None))
        return self._all_labels

    def labels_of(self, indices: npt.NDArray[np.int64] | slice) -> npt.NDArray[np.int64]:
        return self._labels.of(indices)

    @property
    def identity(self) -> dict[str, Any]:
        return self.index.identity

    def key(self, index: int) -> str:
        return self.index.key(index)

    def where(self, index: int) -> str:
        return f"{self.folder}/{self.index.where(index)}"

    def read_many(self, indices: npt.NDArray[np.int64]) -> list[bytes | SampleError]:
        rows = self.index
        # as lists: a number taken out of an array one by one costs more than the rest of this function
        lengths = rows.length[indices].tolist()
        found = self._storage.read_many(rows.shard[indices].tolist(), rows.offset[indices].tolist(), lengths)
        if self.verify and rows.has_crc32:
            stated = rows.crc32[indices].tolist()
            good = [
                type(data) is bytes and len(data) == length and crc32_of(data) == checksum
                for data, length, checksum in zip(found, lengths, stated, strict=True)
            ]
        else:
            good = [
                type(data) is bytes and len(data) == length
                for data, length in zip(found, lengths, strict=True)
            ]
        if all(good):
            return found  # type: ignore[return-value]
        return [
            data if is_good else self._problem(int(index), data)  # type: ignore[misc]
            for index, data, is_good in zip(indices, found, good, strict=True)
        ]

    def read(self, index: int) -> Sample:
        assert 0 <= index < len(self), (index, len(self))
        (data,) = self.read_many(np.array([index]))
        if isinstance(data, SampleError):
            raise data
        return Sample(data, int(self.labels_of(np.array([index]))[0]), self.key(index))

    def read_members(self, indices: Rows, offsets: Rows, lengths: Rows) -> list[bytes | OSError]:
        """Return the bytes of a member of each of the samples `indices`, or why they cannot be had."""
        return self._storage.read_many(self.index.shard[indices].tolist(), offsets.tolist(), lengths.tolist())

    @property
    def has_captions(self) -> bool:
        return self.index.has_captions

    def read_captions(self, indices: npt.NDArray[np.int64]) -> list[str | SampleError]:
        rows = self.index
        assert rows.caption_offset is not None
        assert rows.caption_length is not None
        lengths = rows.caption_length[indices].tolist()
        read = self.read_members(indices, rows.caption_offset[indices], rows.caption_length[indices])
        found: list[str | SampleError] = []
        for index, data, length in zip(indices.tolist(), read, lengths, strict=True):
            text = "" if isinstance(data, OSError) else data.decode(errors="replace").strip()
            if isinstance(data, OSError) or len(data) != length or not text:
                why = "its caption cannot be read" if length else "it has no caption (.txt)"
                found.append(SampleError(f"{self.where(index)}: {why}; mend it or leave it out"))
            else:
                found.append(text)
        return found

    def _problem(self, index: int, data: bytes | OSError) -> SampleError:
        if isinstance(data, OSError):
            why = str(data)
        elif len(data) != self.index.length[index]:
            stated = self.index.length[index]
            why = f"{len(data)} of {stated} bytes read; the shard was cut short, copy it again"
        else:
            why = (
                "its bytes are not those that were indexed (crc32 differs); copy the shard again, or index it"
                " again if it was changed on purpose"
            )
        return SampleError(f"{self.where(index)}: {why}")

    def close(self) -> None:
        """Close this process's files; a later `read` opens them again."""
        self._storage.close()


def _check_fits(index: Index, path: str, saved: Path) -> None:
    """Raise ValueError unless the tars are those that were indexed, by name and size."""
    sizes = {shard.name: shard.size for shard in index.shards}
    found = sizes_of(path)
    lacking, extra = sorted(sizes.keys() - found.keys()), sorted(found.keys() - sizes.keys())
    changed = [
        f"{name} has {found[name]} bytes and had {sizes[name]}"
        for name in sorted(sizes.keys() & found.keys())
        if sizes[name] != found[name]
    ]
    told = [
        *([f"it lacks {some(lacking)}"] if lacking else []),
        *([f"it has {some(extra)}, not indexed"] if extra else []),
        *([some(changed)] if changed else []),
    ]
    if told:
        raise ValueError(
            f"{saved.parent} is not as it was indexed: {'; '.join(told)}; copy it again, or index it again"
            f" with: selfmask data index {saved.parent}"
        )
