"""Labels by class: which number each sample has under the list of classes that is asked for.

Knows the index and names, and nothing of files. Samples are labelled by number where the index has numbers,
else by the folder of their key:

    labels[i] = numbers[i]    or    labels[i] = classes.index(folder of key i)
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from selfmask_dist.common.class_names import normal_name, similar_names
from selfmask_dist.data.indexing.index import Index


class ForeignLabelsWarning(UserWarning):
    """Labels that nobody asked for are of another list of classes, and are not used."""


def resolve_labels(
    index: Index, folder: str, *, classes: Sequence[str] | None, require_labels: bool
) -> tuple[tuple[str, ...], npt.NDArray[np.int64]]:
    """Return the class names, and one label per sample.

    folder: of the shards, for messages. classes: the list that the caller asked for; empty: none.
    require_labels: False for a caller who needs none: a label outside the list of classes is then -1.
    labels: (samples,) int64, -1 = none. Raises ValueError naming shard, key and the way out.
    """
    classes = classes or None
    labels = index.label.astype(np.int64)
    by_folder = index.folders is not None
    missing = np.flatnonzero(labels < 0)
    if len(missing) and require_labels:
        no_numbers = len(missing) == len(labels) or by_folder
        ways = (
            "a .cls member, a label in .json, or a folder"
            if no_numbers
            else "a .cls member or a label in .json"
        )
        raise ValueError(
            f"{folder}/{index.where(int(missing[0]))} has no label"
            f" ({len(missing)} of {len(labels)} samples lack one); give each {ways}"
        )
    if index.folders is not None:
        names = tuple(classes or index.classes or index.folders)
        return names, _labels_of_folders(index, folder, names, require_labels)
    if len(missing) == len(labels):
        return tuple(classes or index.classes or ()), labels
    if classes is not None and index.classes is not None and tuple(classes) != index.classes:
        differs = (
            f"{folder}: dataset.json numbers its {len(index.classes)} classes differently from"
            f" the {len(classes)} asked for"
        )
        if require_labels:
            raise ValueError(f"{differs}; convert all splits together, so that they share one class list")
        warnings.warn(f"{differs}; its labels are not used", ForeignLabelsWarning, stacklevel=3)
        return tuple(classes), np.full_like(labels, -1)
    names = tuple(classes or index.classes or map(str, range(int(labels.max()) + 1)))
    outside = np.flatnonzero(labels >= len(names))
    if not require_labels:
        labels[outside] = -1
    elif len(outside):
        raise ValueError(
            f"{folder}/{index.where(int(outside[0]))} has label {labels[outside[0]]}, and there are only"
            f" {len(names)} classes (0 to {len(names) - 1}); correct the label or the class list"
        )
    return names, labels


def _labels_of_folders(
    index: Index, folder: str, names: tuple[str, ...], require_labels: bool
) -> npt.NDArray[np.int64]:
    folders = [normal_name(name) for name in index.folders or ()]  # an index of before has them as written
    place = {normal_name(name): number for number, name in enumerate(names)}
    for position, name in enumerate(folders):
        if name not in place and require_labels:
            alike = [one for one in names if similar_names([one, name])]
            near = alike or difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "remove its samples or extend the class list"
            first = index.where(int(np.flatnonzero(index.label == position)[0]))
            raise ValueError(
                f"{folder}/{first} is of class {name!r}, which is not among the {len(names)} classes; {hint}"
            )
    # a sample without a folder has -1, which takes the last place
    return np.array([*(place.get(name, -1) for name in folders), -1], dtype=np.int64)[index.label]
