"""What is in the tars: one flat table of samples, and what each is called.

Knows names, offsets and a few label bytes, never pixels; of a file whose name promises no picture it reads
the first bytes. A sample's label is the integer in its `.cls` member, else `"label"` in its `.json` member,
else its folder's place among the sorted class names:

    class_name/file.jpg  ->  labels[i] = sorted(class names).index("class_name")

A negative number, such as -1, says that there is no label.
"""

from __future__ import annotations

import json
import os
from array import array
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selfmask_dist.common.class_names import normal_name
from selfmask_dist.common.pictures import EXTENSIONS, kind_of
from selfmask_dist.common.text import some
from selfmask_dist.data.indexing.tar import Problem, TarSample, walk_samples
from selfmask_dist.data.indexing.targets import MAP_MEMBER, TargetColumns

try:  # zlib's values by the processor's own instructions: ten times as fast
    from isal.isal_zlib import crc32 as crc32_of
except ImportError:  # an optional dependency: selfmask_dist[fast]
    from zlib import crc32 as crc32_of

_READ_BESIDE = ("cls", "json", "txt", MAP_MEMBER)  # what is read of a sample beside its picture
_HEAD = 1 << 20  # bytes that tell whether a file is a picture
_JSON_LABELS = ("label", "cls", "class_id", "category_id")


Check = Callable[[str, bytes], str | None]


class UnusableSampleError(ValueError):
    """One sample cannot be used. The message names shard and key; `reason` is it without them."""

    def __init__(self, path: Path, key: str, reason: str, advice: str) -> None:
        super().__init__(f"{path}: sample {key!r} {reason}; {advice}")
        self.key, self.reason = key, reason


class SampleTable:
    """Keeps the walk's result in flat arrays: a list of Python objects would take ten times the memory.

    require_labels: whether a label that is no class number makes its sample unusable; where labels are not
        asked for, such a sample has none.
    """

    def __init__(self, *, require_labels: bool = True) -> None:
        self.require_labels = require_labels
        self.shard, self.offset, self.length = array("i"), array("q"), array("q")
        self.keys, self.key_end = bytearray(), array("q")
        self.number = array("q")  # the label as an integer, -1 = none given
        self.folder = array("i")  # index into `folders`, -1 = sample at the top of its tar
        self.crc32 = array("I")  # of the picture, 0 where `check` was not asked for
        self.caption_offset, self.caption_length = array("q"), array("q")  # of `.txt`, 0 and 0 = none
        self.targets = TargetColumns()
        self.folders: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.offset)

    def add_shard(
        self,
        number: int,
        path: Path,
        *,
        problems: list[Problem] | None = None,
        check: Check | None = None,
    ) -> None:
        """Append one tar's samples.

        problems: where given, samples that cannot be used are noted in it and left out; else they raise.
        check: called with each picture's extension and bytes, of which the crc32 is then kept; raises
            ValueError for a picture that cannot be used, returns a remark about one that can.
        """
        seen: set[str] = set()
        unread: Counter[str] = Counter()  # members beside a picture, by extension
        with open(path, "rb") as file:
            for sample in walk_samples(path, problems):
                try:
                    picture = self._add(number, path, sample, file.fileno(), seen, problems, check)
                    unread.update(set(sample.members) - {*_READ_BESIDE, picture})
                except UnusableSampleError as problem:
                    if problems is None:
                        raise
                    problems.append(Problem(problem.key, problem.reason))
        if unread and problems is not None:
            told = some([f"{count} .{extension}" for extension, count in sorted(unread.items())])
            problems.append(Problem("", f"members beside pictures are not read: {told}", is_lost=False))

    def _add(
        self,
        number: int,
        path: Path,
        sample: TarSample,
        descriptor: int,
        seen: set[str],
        problems: list[Problem] | None,
        check: Check | None,
    ) -> str:
        """Append one sample, and return the extension of its picture."""
        image = _image_member(path, sample, seen, descriptor)
        if sample.key in seen:
            raise UnusableSampleError(
                path,
                sample.key,
                f"cannot be used: key {sample.key!r} appears twice, apart",
                "keys must be unique and a sample's members neighbours, pack this shard again"
                " (tar --sort=name)",
            )
        seen.add(sample.key)
        extension, offset, length = image
        label, stated_crc32, values = self._given_label(path, sample, descriptor)
        crc32 = 0
        if check is not None:
            data = os.pread(descriptor, length, offset)
            crc32 = crc32_of(data)
            try:
                if stated_crc32 not in (None, crc32):
                    raise ValueError("has other bytes than were packed: its crc32 differs from .json's")
                remark = check(extension, data)
            except ValueError as error:
                raise UnusableSampleError(
                    path, sample.key, str(error), "remove it or pack it again"
                ) from error
            if remark is not None and problems is not None:
                problems.append(Problem(sample.key, remark, is_lost=False))
        self.shard.append(number)
        self.offset.append(offset)
        self.length.append(length)
        self.keys += sample.key.encode(errors="surrogateescape")
        self.key_end.append(len(self.keys))
        self.number.append(label)
        self.crc32.append(crc32)
        caption_offset, caption_length = sample.members.get("txt", (0, 0))
        self.caption_offset.append(caption_offset)
        self.caption_length.append(caption_length)
        self.targets.add(values, sample.members)
        folder = normal_name(sample.key.rpartition("/")[0])
        self.folder.append(self.folders.setdefault(folder, len(self.folders)) if folder else -1)
        return extension

    def _given_label(
        self, path: Path, sample: TarSample, descriptor: int
    ) -> tuple[int, int | None, dict[str, Any]]:
        """Return the integer in `.cls` or under "label" in `.json`, else -1; `.json`'s crc32; and `.json`."""
        try:
            values = _json_of(path, sample, descriptor)
        except UnusableSampleError:
            if self.require_labels:
                raise
            values = {}
        label: Any = next((values[name] for name in _JSON_LABELS if values.get(name) is not None), -1)
        member = ".json"
        if "cls" in sample.members:
            offset, length = sample.members["cls"]
            text = os.pread(descriptor, length, offset).strip()
            label = int(text) if text.removeprefix(b"-").isdigit() and len(text) < 10 else text[:40]
            member = ".cls"
        crc32 = values.get("crc32")
        crc32 = crc32 if type(crc32) is int else None  # another's under the same name
        if type(label) is int and label < 2**31:
            return max(label, -1), crc32, values
        if not self.require_labels:
            return -1, crc32, values
        raise UnusableSampleError(
            path,
            sample.key,
            f"has label {label!r} in {member}",
            "it must be a class number, 0 or above, or -1 for none",
        )

    def extend(self, other: SampleTable) -> None:
        """Append another walk's samples."""
        for name in (
            *("shard", "offset", "length", "number", "crc32"),
            *("caption_offset", "caption_length"),
        ):
            getattr(self, name).extend(getattr(other, name))
        self.targets.extend(other.targets)
        self.key_end.extend(end + len(self.keys) for end in other.key_end)
        self.keys += other.keys
        places = [self.folders.setdefault(name, len(self.folders)) for name in other.folders]
        self.folder.extend(places[folder] if folder >= 0 else -1 for folder in other.folder)


def _image_member(path: Path, sample: TarSample, seen: set[str], descriptor: int) -> tuple[str, int, int]:
    """Return extension, offset and length of the picture, by its name, or by content where no name says it.

    Raises:
        UnusableSampleError: there is none, or several, or an empty one, or its name has a dot inside.
    """
    found = [extension for extension in EXTENSIONS if extension in sample.members]
    dotted = [name for name in sample.members if name.rpartition(".")[2] in EXTENSIONS and "." in name]
    if not found and not dotted:
        found = [name for name in sample.members if _holds_picture(sample, name, descriptor)]
        dotted = [name for name in found if "." in name]
    if dotted and not set(found) - set(dotted):
        raise UnusableSampleError(
            path,
            sample.key,
            f"cannot be used: {sample.key}.{dotted[0]} has a dot inside its name",
            "a WebDataset key ends at the first dot; rename the file",
        )
    if len(found) > 1:
        names = ", ".join(name or "no extension" for name in found)
        raise UnusableSampleError(path, sample.key, f"has several pictures ({names})", "keep one")
    if found:
        offset, length = sample.members[found[0]]
        if length == 0:
            raise UnusableSampleError(path, sample.key, "has an empty picture", "remove it or pack it again")
        return found[0], offset, length
    apart = ": its members are apart" if sample.key in seen else ""
    if "cls" in sample.members or "json" in sample.members:
        raise UnusableSampleError(
            path,
            sample.key,
            f"has a label and no picture{apart}",
            "a sample's members must be neighbours, pack this shard again",
        )
    held = "a caption" if "txt" in sample.members else _named(sample)
    raise UnusableSampleError(
        path,
        sample.key,
        f"has {held} and no picture that PIL can read{apart}",
        "remove it, or leave it out within a budget: selfmask data index",
    )


def _named(sample: TarSample) -> str:
    return ", ".join(f"a file .{name}" if name else "a file without an extension" for name in sample.members)


def _holds_picture(sample: TarSample, extension: str, descriptor: int) -> bool:
    offset, length = sample.members[extension]
    if extension in _READ_BESIDE or length == 0:
        return False
    return kind_of(os.pread(descriptor, min(length, _HEAD), offset)) is not None


def _json_of(path: Path, sample: TarSample, descriptor: int) -> dict[str, Any]:
    """Return the values of `.json`, none where it is absent. Reads those few bytes and no others."""
    if "json" not in sample.members:
        return {}
    offset, length = sample.members["json"]
    try:
        content = json.loads(os.pread(descriptor, length, offset))
    except ValueError as error:
        raise UnusableSampleError(
            path, sample.key, f"has a broken .json ({error})", "pack it again"
        ) from error
    return content if isinstance(content, dict) else {}
