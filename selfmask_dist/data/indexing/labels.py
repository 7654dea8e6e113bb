"""Labels by class: which number each sample has under the list of classes that is asked for.

Knows the index and names, and nothing of files. Samples are labelled by number where the index has numbers,
else by the folder of their key:

    labels[i] = numbers[i]    or    labels[i] = classes.index(folder of key i)

No list of labels is made: a label is looked up in the index's column, which is mapped from its file and so in
memory once for all processes of a node.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from selfmask_dist.common.class_names import normal_name, similar_names
from selfmask_dist.data.indexing.index import Index

_ROWS = 1 << 20  # that are looked at together


class ForeignLabelsWarning(UserWarning):
    """Labels that nobody asked for are of another list of classes, and are not used."""


class Labels:
    """The label of each sample of an index, int64, -1 = none.

    Args:
        places: the label of each value of the index's column, and of -1 in its last place; None where values
            are labels.
        limit: without `places`, values from here on are none.
    """

    def __init__(
        self, index: Index, places: npt.NDArray[np.int64] | None = None, *, limit: int | None = None
    ) -> None:
        self._index, self._places, self._limit = index, places, limit

    def __len__(self) -> int:
        return len(self._index)

    def of(self, rows: npt.NDArray[np.int64] | slice) -> npt.NDArray[np.int64]:
        """Return the labels of the samples at `rows`, (n,)."""
        found = self._index.label[rows].astype(np.int64)
        if self._places is not None:
            return self._places[found]
        if self._limit is not None:
            found[found >= self._limit] = -1
        return found


def resolve_labels(
    index: Index, folder: str, *, classes: Sequence[str] | None, require_labels: bool
) -> tuple[tuple[str, ...], Labels]:
    """Return the class names, and the samples' labels.

    folder: of the shards, for messages. classes: the list that the caller asked for; empty: none.
    require_labels: False for a caller who needs none: a label outside the list of classes is then -1.
    Raises ValueError naming shard, key and the way out.
    """
    classes = classes or None
    num_missing, largest = _survey(index.label)
    by_folder = index.folders is not None
    if num_missing and require_labels:
        no_numbers = num_missing == len(index) or by_folder
        ways = (
            "a .cls member, a label in .json, or a folder"
            if no_numbers
            else "a .cls member or a label in .json"
        )
        raise ValueError(
            f"{folder}/{index.where(int(np.argmax(index.label < 0)))} has no label"
            f" ({num_missing} of {len(index)} samples lack one); give each {ways}"
        )
    if index.folders is not None:
        names = tuple(classes or index.classes or index.folders)
        return names, Labels(index, _places_of_folders(index, folder, names, require_labels))
    if num_missing == len(index):
        return tuple(classes or index.classes or ()), Labels(index)
    if classes is not None and index.classes is not None and tuple(classes) != index.classes:
        differs = (
            f"{folder}: dataset.json numbers its {len(index.classes)} classes differently from"
            f" the {len(classes)} asked for"
        )
        if require_labels:
            raise ValueError(f"{differs}; convert all splits together, so that they share one class list")
        warnings.warn(f"{differs}; its labels are not used", ForeignLabelsWarning, stacklevel=3)
        return tuple(classes), Labels(index, limit=0)
    names = tuple(classes or index.classes or map(str, range(largest + 1)))
    if largest >= len(names) and require_labels:
        first = int(np.argmax(index.label >= len(names)))
        raise ValueError(
            f"{folder}/{index.where(first)} has label {index.label[first]}, and there are only"
            f" {len(names)} classes (0 to {len(names) - 1}); correct the label or the class list"
        )
    return names, Labels(index, limit=len(names) if largest >= len(names) else None)


def _survey(column: npt.NDArray[np.int32]) -> tuple[int, int]:
    """Return how many samples lack a label, and the largest value, -1 where all do."""
    num_missing, largest = 0, -1
    for start in range(0, len(column), _ROWS):
        part = column[start : start + _ROWS]
        num_missing += int(np.count_nonzero(part < 0))
        largest = max(largest, int(part.max()))
    return num_missing, largest


def _places_of_folders(
    index: Index, folder: str, names: tuple[str, ...], require_labels: bool
) -> npt.NDArray[np.int64]:
    folders = [normal_name(name) for name in index.folders or ()]  # an index of before has them as written
    place = {normal_name(name): number for number, name in enumerate(names)}
    for position, name in enumerate(folders):
        if name not in place and require_labels:
            alike = [one for one in names if similar_names([one, name])]
            near = alike or difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "remove its samples or extend the class list"
            first = index.where(int(np.argmax(index.label == position)))
            raise ValueError(
                f"{folder}/{first} is of class {name!r}, which is not among the {len(names)} classes; {hint}"
            )
    # a sample without a folder has -1, which takes the last place
    return np.array([*(place.get(name, -1) for name in folders), -1], dtype=np.int64)
