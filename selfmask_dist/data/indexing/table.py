"""What is in the tars: one flat table of samples, and what each is called.

Knows names, offsets and a few label bytes, never pixels. A sample's label is the integer in its `.cls`
member, else `"label"` in its `.json` member, else its folder's place among the sorted class names:

    class_name/file.jpg  ->  labels[i] = sorted(class names).index("class_name")
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selfmask_dist.data.indexing.tar import Problem, TarSample, walk_samples

try:  # zlib's values by the processor's own instructions: ten times as fast
    from isal.isal_zlib import crc32 as crc32_of
except ImportError:  # an optional dependency: selfmask_dist[fast]
    from zlib import crc32 as crc32_of

# by name; what is inside is found out when it is decoded
IMAGE_EXTENSIONS = (
    *("jpg", "jpeg", "jpe", "jfif", "png", "webp"),
    *("bmp", "gif", "tif", "tiff", "ppm", "pgm"),
)
_JSON_LABELS = ("label", "cls", "class_id", "category_id")


Check = Callable[[str, bytes], str | None]


class UnusableSampleError(ValueError):
    """One sample cannot be used. The message names shard and key; `reason` is it without them."""

    def __init__(self, path: Path, key: str, reason: str, advice: str) -> None:
        super().__init__(f"{path}: sample {key!r} {reason}; {advice}")
        self.key, self.reason = key, reason


class SampleTable:
    """Keeps the walk's result in flat arrays: a list of Python objects would take ten times the memory."""

    def __init__(self) -> None:
        self.shard, self.offset, self.length = array("i"), array("q"), array("q")
        self.keys, self.key_end = bytearray(), array("q")
        self.number = array("q")  # the label as an integer, -1 = none given
        self.folder = array("i")  # index into `folders`, -1 = sample at the top of its tar
        self.crc32 = array("I")  # of the picture, 0 where `check` was not asked for
        self.caption_offset, self.caption_length = array("q"), array("q")  # of `.txt`, 0 and 0 = none
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
        with open(path, "rb") as file:
            for sample in walk_samples(path, problems):
                try:
                    self._add(number, path, sample, file.fileno(), seen, problems, check)
                except UnusableSampleError as problem:
                    if problems is None:
                        raise
                    problems.append(Problem(problem.key, problem.reason))

    def _add(
        self,
        number: int,
        path: Path,
        sample: TarSample,
        descriptor: int,
        seen: set[str],
        problems: list[Problem] | None,
        check: Check | None,
    ) -> None:
        image = _image_member(path, sample, seen)
        if image is None:
            return
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
        label, stated_crc32 = _given_label(path, sample, descriptor)
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
        folder = sample.key.rpartition("/")[0]
        self.folder.append(self.folders.setdefault(folder, len(self.folders)) if folder else -1)

    def extend(self, other: SampleTable) -> None:
        """Append another walk's samples."""
        for name in (
            *("shard", "offset", "length", "number", "crc32"),
            *("caption_offset", "caption_length"),
        ):
            getattr(self, name).extend(getattr(other, name))
        self.key_end.extend(end + len(self.keys) for end in other.key_end)
        self.keys += other.keys
        places = [self.folders.setdefault(name, len(self.folders)) for name in other.folders]
        self.folder.extend(places[folder] if folder >= 0 else -1 for folder in other.folder)


def _image_member(path: Path, sample: TarSample, seen: set[str]) -> tuple[str, int, int] | None:
    """Return the picture's extension, offset and length; None for a file that is no sample, as a read-me."""
    found = [extension for extension in IMAGE_EXTENSIONS if extension in sample.members]
    if len(found) > 1:
        raise UnusableSampleError(path, sample.key, f"has several pictures ({', '.join(found)})", "keep one")
    if found:
        offset, length = sample.members[found[0]]
        if length == 0:
            raise UnusableSampleError(path, sample.key, "has an empty picture", "remove it or pack it again")
        return found[0], offset, length
    dotted = [name for name in sample.members if name.rpartition(".")[2] in IMAGE_EXTENSIONS]
    if dotted:
        raise UnusableSampleError(
            path,
            sample.key,
            f"cannot be used: {sample.key}.{dotted[0]} has a dot inside its name",
            "a WebDataset key ends at the first dot; rename the file",
        )
    if "cls" in sample.members or "json" in sample.members:
        apart = ": its members are apart" if sample.key in seen else ""
        raise UnusableSampleError(
            path,
            sample.key,
            f"has a label and no picture{apart}",
            "a sample's members must be neighbours, pack this shard again",
        )
    return None


def _given_label(path: Path, sample: TarSample, descriptor: int) -> tuple[int, int | None]:
    """Return the label and the stated crc32 of the picture; reads those few bytes and no others.

    The label is the integer in `.cls` or under "label" in `.json`, else -1. The crc32 may be None.
    """
    values: dict[str, Any] = {}
    if "json" in sample.members:
        offset, length = sample.members["json"]
        try:
            content = json.loads(os.pread(descriptor, length, offset))
        except ValueError as error:
            raise UnusableSampleError(
                path, sample.key, f"has a broken .json ({error})", "pack it again"
            ) from error
        values = content if isinstance(content, dict) else {}
    crc32 = values.get("crc32")
    label: Any = next((values[name] for name in _JSON_LABELS if values.get(name) is not None), None)
    member = ".json"
    if "cls" in sample.members:
        offset, length = sample.members["cls"]
        text = os.pread(descriptor, length, offset).strip()
        label = int(text) if text.isdigit() and len(text) < 10 else text[:40]
        member = ".cls"
    elif label is None:
        return -1, crc32
    if type(label) is not int or not 0 <= label < 2**31:
        raise UnusableSampleError(
            path,
            sample.key,
            f"has label {label!r} in {member}",
            "it must be a class number, 0 or above",
        )
    return label, crc32
