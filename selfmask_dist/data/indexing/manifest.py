"""Which tars a path means, and what the `dataset.json` beside them says of them.

Knows file names and sizes, and nothing of what is inside a tar.
"""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from selfmask_dist.common.text import some
from selfmask_dist.data.indexing.patterns import expand, is_pattern, matches

MANIFEST_NAME = "dataset.json"
HOW_TO_MAKE = "make tars from a folder of pictures with: selfmask data convert folder PICTURES OUT"


@dataclass(frozen=True)
class Manifest:
    """What is known of the shards before they are opened. samples: how many each should hold."""

    classes: tuple[str, ...] | None
    samples: dict[Path, int]


def read_manifest(shards: list[Path], *, whole_folder: bool) -> Manifest:
    """Return what the `dataset.json` files beside the shards say; nothing where there are none.

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
            detail = f"lacks {some(lacking)}" if lacking else f"has {some(extra)}, which it does not name"
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
    return Manifest(next(iter(classes), None), samples)


def find_shards(path: str) -> list[Path]:
    """Return the tars that a path means, by name: a folder's, one tar's, or those of a pattern or a list.

    path: as `patterns` describes it. Raises ValueError with the way out where there are none, where a part of
    a pattern names nothing, or where one cannot be read.
    """
    shards: list[Path] = []
    parts = expand(path)
    absent: list[str] = []
    for part in parts:
        if os.path.isdir(part):
            shards += _tars_of(Path(part))
        else:
            found = [Path(name) for name in matches(part) if not os.path.isdir(name)]
            shards += found
            absent += [] if found else [part]
    if absent:
        meant = "" if [path] == parts else f"; {path} stands for {len(parts)} paths, {len(absent)} are absent"
        raise ValueError(
            f"{some(absent)}: no such file or folder, and nothing matches it as a pattern{meant};"
            f" {HOW_TO_MAKE}"
        )
    if len(parts) > 1 or is_pattern(path):
        twice = [str(shard) for shard, count in Counter(map(os.path.realpath, shards)).items() if count > 1]
        if twice:
            raise ValueError(f"{path} names {some(twice)} more than once; name each tar once")
    for shard in shards:
        _check_is_readable(shard)
    return sorted(shards)


def sizes_of(path: str) -> dict[str, int]:
    """Return the bytes of each tar of a folder, or of one tar, by name: one `stat` for each.

    Raises ValueError where there are none, or one cannot be read.
    """
    if not os.path.isdir(path):
        return {shard.name: shard.stat().st_size for shard in find_shards(path)}
    found: dict[str, int] = {}
    with os.scandir(path) as entries:
        for entry in entries:
            if not entry.name.endswith(".tar") or entry.name.startswith("."):
                continue
            try:
                status = entry.stat()
            except OSError:
                status = None
            if status is None or not stat.S_ISREG(status.st_mode):
                _check_is_readable(Path(entry.path))  # says what it is in place of a file
            assert status is not None
            found[entry.name] = status.st_size
    if not found:
        _tars_of(Path(path))
    return found


def _tars_of(folder: Path) -> list[Path]:
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        below = sorted({tar.parent.name for tar in folder.glob("*/*.tar")})
        hint = f"there are some in {some(below)}: name one of these" if below else HOW_TO_MAKE
        raise ValueError(f"{folder}: no *.tar in this folder; {hint}")
    return shards


def _check_is_readable(shard: Path) -> None:
    """Raises ValueError before anything is opened: opening a pipe would wait for ever."""
    if not os.path.exists(shard):
        raise ValueError(f"{shard}: a link to {os.path.realpath(shard)}, which is absent; mend or remove it")
    if not os.path.isfile(shard):
        raise ValueError(
            f"{shard}: no regular file, so it cannot be read by offset; write it to a file first"
        )
    if not os.access(shard, os.R_OK):
        raise ValueError(f"{shard}: may not be read by this user; change its permissions or remove it")
