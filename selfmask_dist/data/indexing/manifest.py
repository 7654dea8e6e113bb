"""Which tars a path means, and what the `dataset.json` beside them says of them.

Knows file names and sizes, and nothing of what is inside a tar.
"""

from __future__ import annotations

import glob
import json
import os
from dataclasses import dataclass
from pathlib import Path

from selfmask_dist.common.text import some

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
    """Return the tars that a path means, by name: a folder's, one tar, or those that match a pattern.

    Raises ValueError with the way out where there are none.
    """
    if os.path.isdir(path):
        shards = sorted(Path(path).glob("*.tar"))
        if not shards:
            below = sorted(tar.parent.name for tar in Path(path).glob("*/*.tar"))
            hint = (
                f"there are some in {some(sorted(set(below)))}: name one of these" if below else HOW_TO_MAKE
            )
            raise ValueError(f"{path}: no *.tar in this folder; {hint}")
        return shards
    if os.path.isfile(path):
        return [Path(path)]
    shards = sorted(Path(name) for name in glob.glob(path) if os.path.isfile(name))
    if not shards:
        raise ValueError(
            f"{path}: no such file or folder, and nothing matches it as a pattern; {HOW_TO_MAKE}"
        )
    return shards
