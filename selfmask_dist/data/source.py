"""Samples by number from WebDataset tars: an offset table made by one header walk, and `pread`.

Knows neither order, epochs, ranks nor pixels. `Source` is what the rest of the package sees; `TarSource` is
the reader behind it, with

    read(i) = pread(shard[i], length[i], offset[i]).

Labels are `table`'s matter. A `dataset.json` beside the tars, as data_prep writes it, names the classes and
the shards.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from selfmask_dist.data.table import IMAGE_EXTENSIONS, SampleTable, resolve_labels

MANIFEST_NAME = "dataset.json"
_MAX_OPEN_SHARDS = 64  # per process; far below the usual limit of 1024 descriptors


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
    labels: npt.NDArray[np.int64]  # (len,), -1 = none

    def __len__(self) -> int: ...
    def key(self, index: int) -> str: ...
    def where(self, index: int) -> str:
        """Shard and key, for messages."""
        ...

    def read(self, index: int) -> Sample:
        """Raises SampleError where the bytes cannot be had."""
        ...


def open_source(
    path: str | Path, *, classes: Sequence[str] | None = None, require_labels: bool = True
) -> TarSource:
    """A source over a folder of `*.tar` files, one tar, or a glob pattern; shards in order of their names.

    classes: the class list to number by, for a split that may lack classes: pass the training source's
        `classes`.
    require_labels: False accepts samples without a label (-1), for training that reads none.
    Raises ValueError naming shard, key and the way out: nothing found, a damaged shard, a sample without
    picture or label, a label that the class list does not have.
    """
    path = os.path.expanduser(path)
    shards = _find_shards(path)
    manifest = _read_manifest(shards, whole_folder=os.path.isdir(path))
    table = SampleTable()
    for number, shard in enumerate(shards):
        before = len(table.offset)
        table.add_shard(number, shard)
        found, promised = len(table.offset) - before, manifest.samples.get(shard)
        if found == 0:
            raise ValueError(
                f"{shard}: no pictures in it (looked for {', '.join(IMAGE_EXTENSIONS)}); move it away"
            )
        if promised is not None and promised != found:
            raise ValueError(
                f"{shard}: holds {found} samples, {MANIFEST_NAME} promises {promised}; convert again"
            )
    names, labels = resolve_labels(
        table, shards, classes=classes, manifest_classes=manifest.classes, require_labels=require_labels
    )
    return TarSource(shards, table, labels, names)


def check_same_classes(train: Source, test: Source) -> None:
    """Raises ValueError unless both sources number the same classes in the same way."""
    if train.classes == test.classes:
        return
    lacking = [name for name in train.classes if name not in set(test.classes)]
    extra = [name for name in test.classes if name not in set(train.classes)]
    detail = "; ".join(
        f"{what} has no {_some(names)}" for what, names in (("test", lacking), ("train", extra)) if names
    )
    raise ValueError(
        f"train has {len(train.classes)} classes and test {len(test.classes)}, numbered differently"
        f" ({detail or 'same names, other order'}); open the test data with classes=train.classes"
    )


class TarSource:
    """Random access to the pictures of local tars; see `open_source`. 36 bytes and the key per sample."""

    def __init__(
        self, shards: list[Path], table: SampleTable, labels: npt.NDArray[np.int64], classes: tuple[str, ...]
    ) -> None:
        self.classes = classes
        self.labels = labels
        self._shards = shards
        self._stamps = [_stamp(os.stat(shard)) for shard in shards]
        self._shard = np.array(table.shard, dtype=np.int32)
        self._offset = np.array(table.offset, dtype=np.int64)
        self._length = np.array(table.length, dtype=np.int64)
        self._keys = bytes(table.keys)
        self._key_end = np.array(table.key_end, dtype=np.int64)
        self._descriptors: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._offset)

    def key(self, index: int) -> str:
        start = self._key_end[index - 1] if index > 0 else 0
        return self._keys[start : self._key_end[index]].decode(errors="surrogateescape")

    def where(self, index: int) -> str:
        return f"{self._shards[self._shard[index]]}: sample {self.key(index)!r}"

    def read(self, index: int) -> Sample:
        assert 0 <= index < len(self), (index, len(self))
        length, offset = int(self._length[index]), int(self._offset[index])
        try:
            data = os.pread(self._descriptor(int(self._shard[index])), length, offset)
        except OSError as error:
            raise SampleError(f"{self.where(index)}: {error}") from error
        if len(data) != length:
            raise SampleError(
                f"{self.where(index)}: {len(data)} of {length} bytes read; the shard was cut short,"
                " copy it again"
            )
        return Sample(data, int(self.labels[index]), self.key(index))

    def close(self) -> None:
        """Close this process's file descriptors; a later `read` opens them again."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __del__(self) -> None:
        if hasattr(self, "_descriptors"):
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_descriptors": {}}  # a descriptor means nothing in another process

    def _descriptor(self, shard: int) -> int:
        descriptor = self._descriptors.get(shard)
        if descriptor is None:
            if len(self._descriptors) >= _MAX_OPEN_SHARDS:
                os.close(self._descriptors.pop(next(iter(self._descriptors))))
            descriptor = os.open(self._shards[shard], os.O_RDONLY | os.O_CLOEXEC)
            if _stamp(os.fstat(descriptor)) != self._stamps[shard]:
                os.close(descriptor)
                raise OSError("the shard changed after it was opened; start again to read its new headers")
            self._descriptors[shard] = descriptor
        return descriptor


@dataclass(frozen=True)
class _Manifest:
    classes: tuple[str, ...] | None
    samples: dict[Path, int]  # how many samples each shard should hold


def _read_manifest(shards: list[Path], *, whole_folder: bool) -> _Manifest:
    """What the `dataset.json` files beside the shards say; nothing where there are none.

    Raises ValueError where a folder's manifest names a shard that is absent or of another size.
    """
    classes: set[tuple[str, ...]] = set()
    samples: dict[Path, int] = {}
    for folder in sorted({shard.parent for shard in shards}):
        path = folder / MANIFEST_NAME
        if not path.is_file():
            continue
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            names = tuple(str(name) for name in values["classes"])
            sizes = {
                entry["name"]: (int(entry["samples"]), int(entry["bytes"])) for entry in values["shards"]
            }
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: not a data set's description ({error!r}); convert again or remove it"
            ) from None
        if len(set(names)) != len(names):
            raise ValueError(f"{path}: a class name appears twice; convert again")
        classes.add(names)
        present = {shard.name: shard for shard in shards if shard.parent == folder}
        if whole_folder and present.keys() != sizes.keys():
            lacking, extra = sorted(sizes.keys() - present.keys()), sorted(present.keys() - sizes.keys())
            detail = f"lacks {_some(lacking)}" if lacking else f"has {_some(extra)}, which it does not name"
            raise ValueError(f"{path} and its folder differ: the folder {detail}; copy or convert again")
        for name in present.keys() & sizes.keys():
            if present[name].stat().st_size != sizes[name][1]:
                raise ValueError(
                    f"{present[name]}: {present[name].stat().st_size} bytes, {MANIFEST_NAME} promises"
                    f" {sizes[name][1]}; copy or convert again"
                )
            samples[present[name]] = sizes[name][0]
    if len(classes) > 1:
        raise ValueError(
            f"the folders of these {len(shards)} shards name different classes; open them one by one"
        )
    return _Manifest(next(iter(classes), None), samples)


def _find_shards(path: str) -> list[Path]:
    if os.path.isdir(path):
        shards = sorted(Path(path).glob("*.tar"))
        if not shards:
            below = sorted(tar.parent.name for tar in Path(path).glob("*/*.tar"))
            hint = (
                f"there are some in {_some(sorted(set(below)))}: name one of these" if below else _HOW_TO_MAKE
            )
            raise ValueError(f"{path}: no *.tar in this folder; {hint}")
        return shards
    if os.path.isfile(path):
        return [Path(path)]
    shards = sorted(Path(name) for name in glob.glob(path) if os.path.isfile(name))
    if not shards:
        raise ValueError(
            f"{path}: no such file or folder, and nothing matches it as a pattern; {_HOW_TO_MAKE}"
        )
    return shards


_HOW_TO_MAKE = "make tars from a folder of pictures with: python data_prep/image_folder.py PICTURES OUT"


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
