"""What is in the tars: one flat table of samples, and what each is called.

Knows names, offsets and a few label bytes, never pixels. A sample's label is the integer in its `.cls`
member, else `"label"` in its `.json` member, else its folder's place among the sorted class names:

    class_name/file.jpg  ->  labels[i] = sorted(class names).index("class_name")
"""

from __future__ import annotations

import difflib
import json
import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from selfmask_dist.data.tar import TarSample, walk_samples

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")


class SampleTable:
    """The walk's result in flat arrays: a list of Python objects would cost ten times as much."""

    def __init__(self) -> None:
        self.shard, self.offset, self.length = array("i"), array("q"), array("q")
        self.keys, self.key_end = bytearray(), array("q")
        self.number = array("q")  # the label as an integer, -1 = none given
        self.folder = array("i")  # index into `folders`, -1 = sample at the top of its tar
        self.folders: dict[str, int] = {}

    def add_shard(self, number: int, path: Path) -> None:
        seen: set[str] = set()
        with open(path, "rb") as file:
            for sample in walk_samples(path):
                image = _image_member(path, sample)
                if image is None:
                    continue
                if sample.key in seen:
                    raise ValueError(
                        f"{path}: key {sample.key!r} appears twice, apart; keys must be unique and a sample's"
                        " members neighbours, pack this shard again (tar --sort=name)"
                    )
                seen.add(sample.key)
                self.shard.append(number)
                self.offset.append(image[0])
                self.length.append(image[1])
                self.keys += sample.key.encode(errors="surrogateescape")
                self.key_end.append(len(self.keys))
                self.number.append(_given_label(path, sample, file.fileno()))
                folder = sample.key.rpartition("/")[0]
                self.folder.append(self.folders.setdefault(folder, len(self.folders)) if folder else -1)

    def where(self, index: int, shards: list[Path]) -> str:
        start = self.key_end[index - 1] if index > 0 else 0
        key = self.keys[start : self.key_end[index]].decode(errors="surrogateescape")
        return f"{shards[self.shard[index]]}: sample {key!r}"


def _image_member(path: Path, sample: TarSample) -> tuple[int, int] | None:
    """Offset and length of the picture; None for a file that is no sample, such as a read-me."""
    found = [extension for extension in IMAGE_EXTENSIONS if extension in sample.members]
    if len(found) > 1:
        raise ValueError(f"{path}: sample {sample.key!r} has several pictures ({', '.join(found)}); keep one")
    if found:
        offset, length = sample.members[found[0]]
        if length == 0:
            raise ValueError(
                f"{path}: sample {sample.key!r} has an empty picture; remove it or pack it again"
            )
        return offset, length
    dotted = [name for name in sample.members if name.rpartition(".")[2] in IMAGE_EXTENSIONS]
    if dotted:
        raise ValueError(
            f"{path}: {sample.key}.{dotted[0]} has a dot inside its name, and a WebDataset key ends at the"
            " first dot; rename the file"
        )
    if "cls" in sample.members or "json" in sample.members:
        raise ValueError(
            f"{path}: sample {sample.key!r} has a label and no picture; a sample's members must be"
            " neighbours, pack this shard again"
        )
    return None


def _given_label(path: Path, sample: TarSample, descriptor: int) -> int:
    """The integer in `.cls` or under "label" in `.json`, or -1. Reads those few bytes and no others."""
    if "cls" in sample.members:
        offset, length = sample.members["cls"]
        text = os.pread(descriptor, length, offset).strip()
        label: Any = int(text) if text.isdigit() and len(text) < 10 else text[:40]
        member = ".cls"
    elif "json" in sample.members:
        offset, length = sample.members["json"]
        try:
            values = json.loads(os.pread(descriptor, length, offset))
        except ValueError as error:
            raise ValueError(
                f"{path}: sample {sample.key!r} has a broken .json ({error}); pack it again"
            ) from error
        label = values.get("label") if isinstance(values, dict) else None
        if label is None:
            return -1
        member = ".json"
    else:
        return -1
    if type(label) is not int or not 0 <= label < 2**31:
        raise ValueError(
            f"{path}: sample {sample.key!r} has label {label!r} in {member};"
            " it must be a class number, 0 or above"
        )
    return label


def resolve_labels(
    table: SampleTable,
    shards: list[Path],
    *,
    classes: Sequence[str] | None,
    manifest_classes: tuple[str, ...] | None,
    require_labels: bool,
) -> tuple[tuple[str, ...], npt.NDArray[np.int64]]:
    """Class names, and one label per sample: by number where any sample has one, else by folder.

    classes: the list that the caller asked for. manifest_classes: the list in `dataset.json`.
    labels: (samples,) int64, -1 = none. Raises ValueError naming shard, key and the way out.
    """
    numbers = np.array(table.number, dtype=np.int64)
    folders = np.array(table.folder, dtype=np.int64)
    by_number = bool((numbers >= 0).any())
    missing = np.flatnonzero((numbers if by_number else folders) < 0)
    if len(missing) and require_labels:
        ways = (
            "a .cls member or a label in .json"
            if by_number
            else "a .cls member, a label in .json, or a folder"
        )
        raise ValueError(
            f"{table.where(int(missing[0]), shards)} has no label"
            f" ({len(missing)} of {len(numbers)} samples lack one); give each {ways}"
        )
    if not by_number:
        names = tuple(classes or manifest_classes or sorted(table.folders))
        return names, _labels_of_folders(table, shards, folders, names)
    if classes is not None and manifest_classes is not None and tuple(classes) != manifest_classes:
        raise ValueError(
            f"{shards[0].parent}: dataset.json numbers its {len(manifest_classes)} classes differently from"
            f" the {len(classes)} asked for; convert all splits together, so that they share one class list"
        )
    names = tuple(classes or manifest_classes or map(str, range(int(numbers.max()) + 1)))
    outside = np.flatnonzero(numbers >= len(names))
    if len(outside):
        raise ValueError(
            f"{table.where(int(outside[0]), shards)} has label {numbers[outside[0]]}, and there are only"
            f" {len(names)} classes (0 to {len(names) - 1}); correct the label or the class list"
        )
    return names, numbers


def _labels_of_folders(
    table: SampleTable, shards: list[Path], folders: npt.NDArray[np.int64], names: tuple[str, ...]
) -> npt.NDArray[np.int64]:
    place = {name: number for number, name in enumerate(names)}
    for folder, position in table.folders.items():
        if folder not in place:
            near = difflib.get_close_matches(folder, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "remove its samples or extend the class list"
            first = table.where(int(np.flatnonzero(folders == position)[0]), shards)
            raise ValueError(
                f"{first} is of class {folder!r}, which is not among the {len(names)} classes; {hint}"
            )
    # a sample without a folder has -1, which takes the last place
    return np.array([place[folder] for folder in table.folders] + [-1], dtype=np.int64)[folders]
