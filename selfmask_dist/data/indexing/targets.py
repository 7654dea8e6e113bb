"""What a sample is trained towards beside one class: several labels, numbers, or a label map.

    key.json      {"labels": [0, 4]}          several classes; [] says that it is of none of them
    key.json      {"value": 1.5}              a number, or {"values": [1.5, 2]} several
    key.seg.png   one byte a pixel            the class of each pixel, 255 = not counted

Labels and numbers are in the index, in columns of its own that only such data sets have, so that training
reads no file for them; of a map the index has the place. Knows neither pictures nor what targets are for.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

MAP_MEMBER = "seg.png"
MAX_LABEL = 2**20  # of several labels: a row of zeros and ones is made of each sample
_ABSENT = -1.0  # the one entry of a sample without a list of labels; an empty list is one as well
_MAP_COLUMNS = {"map_offset": "<i8", "map_length": "<u4"}
# a column's name, type and length -> the column
Take = Callable[[str, int], npt.NDArray[Any]]


def labels_of(values: Mapping[str, Any]) -> list[float] | None:
    """Return the labels under "labels" of a sample's `.json`; None where there is no list of class numbers,
    0 or above, each once.
    """
    found = values.get("labels")
    if not isinstance(found, list) or any(type(one) is not int or not 0 <= one < MAX_LABEL for one in found):
        return None
    return None if len(set(found)) < len(found) else [float(one) for one in found]


def numbers_of(values: Mapping[str, Any]) -> list[float] | None:
    """Return the numbers under "value" or "values" of a sample's `.json`; None without finite numbers."""
    found = values.get("value", values.get("values"))
    found = found if isinstance(found, list) else [found]
    if not found or any(type(one) not in (int, float) for one in found):
        return None
    numbers = [float(one) for one in found]
    return numbers if all(map(math.isfinite, numbers)) else None


class TargetColumns:
    """The targets of a walk's samples, appended one by one; see `SampleTable`."""

    def __init__(self) -> None:
        self.labels, self.label_end = array("d"), array("q")
        self.values, self.value_end = array("d"), array("q")
        self.map_offset, self.map_length = array("q"), array("q")  # 0 and 0 = none
        self.has_labels = False

    def add(self, values: Mapping[str, Any], members: Mapping[str, tuple[int, int]]) -> None:
        """Append a sample's, from its `.json` and its members."""
        labels = labels_of(values)
        self.has_labels |= labels is not None
        self.labels.extend([_ABSENT] if labels is None else labels)
        self.label_end.append(len(self.labels))
        self.values.extend(numbers_of(values) or [])
        self.value_end.append(len(self.values))
        offset, length = members.get(MAP_MEMBER, (0, 0))
        self.map_offset.append(offset)
        self.map_length.append(length)

    def extend(self, other: TargetColumns) -> None:
        """Append another walk's."""
        for end, numbers in (("label_end", "labels"), ("value_end", "values")):
            shift = len(getattr(self, numbers))
            getattr(self, end).extend(one + shift for one in getattr(other, end))
            getattr(self, numbers).extend(getattr(other, numbers))
        self.map_offset.extend(other.map_offset)
        self.map_length.extend(other.map_length)
        self.has_labels |= other.has_labels

    def finish(self) -> IndexTargets:
        """Return the columns of an index, without those in which no sample has anything."""
        has_maps = any(self.map_length)
        return IndexTargets(
            labels=_ragged(self.label_end, self.labels) if self.has_labels else None,
            values=_ragged(self.value_end, self.values) if len(self.values) else None,
            map_offset=np.array(self.map_offset, dtype=np.int64) if has_maps else None,
            map_length=np.array(self.map_length, dtype=np.uint32) if has_maps else None,
        )


@dataclass(frozen=True)
class Ragged:
    """A list of numbers for each row: those of row i are numbers[end[i - 1] : end[i]]."""

    end: npt.NDArray[np.int64]
    numbers: npt.NDArray[np.float64]

    def row(self, row: int) -> npt.NDArray[np.float64]:
        """Return the numbers of one row."""
        return self.numbers[int(self.end[row - 1]) if row > 0 else 0 : int(self.end[row])]

    def counts(self) -> npt.NDArray[np.int64]:
        """Return how many numbers each row has, (rows,)."""
        return np.diff(self.end, prepend=0)

    def keep(self, rows: npt.NDArray[np.bool_]) -> Ragged:
        """Return the rows where `rows`, of shape (len,), is true."""
        counts = self.counts()
        return Ragged(np.cumsum(counts[rows]), self.numbers[np.repeat(rows, counts)])


@dataclass(frozen=True)
class IndexTargets:
    """Targets of an index, by row; None for a kind that no sample has.

    labels: class numbers, or one entry -1 where a sample has no list. values: none where a sample has none.
    map_offset, map_length: of `.seg.png` in its shard; 0 and 0 where a sample has none.
    """

    labels: Ragged | None = None
    values: Ragged | None = None
    map_offset: npt.NDArray[np.int64] | None = None
    map_length: npt.NDArray[np.uint32] | None = None

    def __bool__(self) -> bool:
        return self.labels is not None or self.values is not None or self.map_length is not None

    def present(self, num_rows: int) -> npt.NDArray[np.bool_]:
        """Return which rows have a target of any kind, (rows,)."""
        found = np.zeros(num_rows, dtype=bool)
        if self.labels is not None:
            first = np.append(self.labels.numbers, 0.0)[self.labels.end - self.labels.counts()]
            found |= (self.labels.counts() != 1) | (first != _ABSENT)
        if self.values is not None:
            found |= self.values.counts() > 0
        if self.map_length is not None:
            found |= self.map_length > 0
        return found

    def keep(self, rows: npt.NDArray[np.bool_]) -> IndexTargets:
        """Return the rows where `rows`, of shape (len,), is true."""
        return IndexTargets(
            None if self.labels is None else self.labels.keep(rows),
            None if self.values is None else self.values.keep(rows),
            None if self.map_offset is None else self.map_offset[rows],
            None if self.map_length is None else self.map_length[rows],
        )

    def describe(self) -> dict[str, int]:
        """Return what an index file's header says: how many numbers each kind has in all."""
        found = {
            name: len(column.numbers)
            for name, column in (("labels", self.labels), ("values", self.values))
            if column is not None
        }
        return found | ({} if self.map_length is None else {"maps": len(self.map_length)})

    def columns(self) -> list[npt.NDArray[Any]]:
        """Return the columns as an index file has them, in its order."""
        found: list[npt.NDArray[Any]] = []
        for column in (self.labels, self.values):
            if column is not None:
                found += [
                    np.ascontiguousarray(column.end, "<i8"),
                    np.ascontiguousarray(column.numbers, "<f8"),
                ]
        for name, kind in _MAP_COLUMNS.items():
            if (one := getattr(self, name)) is not None:
                found.append(np.ascontiguousarray(one, kind))
        return found

    def digest(self) -> str:
        """Return what tells these targets from any others."""
        digest = hashlib.sha256(repr(sorted(self.describe())).encode())
        for column in self.columns():
            digest.update(column.data)
        return digest.hexdigest()[:16]


def read_columns(stated: Mapping[str, int], num_rows: int, take: Take) -> IndexTargets:
    """Return the targets of an index file, with `take` for its next column; undoes `columns`.

    Args:
        stated: what the file's header says, see `describe`.
    """
    ragged = {}
    for name in ("labels", "values"):
        if name in stated:
            end = take("<i8", num_rows)
            ragged[name] = Ragged(end, take("<f8", stated[name]))
    maps = {name: take(kind, num_rows) for name, kind in _MAP_COLUMNS.items()} if "maps" in stated else {}
    return IndexTargets(**ragged, **maps)


def _ragged(end: array[int], numbers: array[float]) -> Ragged:
    return Ragged(np.array(end, dtype=np.int64), np.array(numbers, dtype=np.float64))
