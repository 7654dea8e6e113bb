"""From rows of (picture, target) to a split of tars: what converters of targets share. Knows no layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from selfmask_dist.common.text import some

from ..options import ConversionOptions
from ..shards import Conversion, check_target, member_name, publish, write_split
from ..tables import resolve, why_absent
from ..writer import Picture, RejectedFile


@dataclass(frozen=True)
class Row:
    """A picture with what it is trained towards.

    name: its path inside the folder of pictures. target: goes into key.json. label_map: a PNG beside it.
    problem: why the row cannot be used, which is said with its name.
    """

    name: str
    target: dict[str, Any] | None = None
    label_map: Path | None = None
    problem: str = ""


def write_rows(
    images: Path,
    splits: dict[str, list[Row]],
    out: Path,
    outputs: Sequence[str],
    options: ConversionOptions,
) -> list[Conversion]:
    """Write a folder of tars for each split, and return what was written.

    Args:
        images: the folder that names start from.
        outputs: names of classes or quantities, in order; they are `classes` in dataset.json.

    Raises:
        ValueError: naming the rows that cannot be used, unless `options.skip_broken` lists them in
            rejects.jsonl; or there is nothing to write.
    """
    if not images.is_dir():
        raise ValueError(f"{images} is no folder; give the one that the names of pictures start from")
    for split in splits:
        check_target(out / split, options.overwrite)
    plans = {split: _plan(split, rows, images, options) for split, rows in splits.items()}
    done = []
    for split, (pictures, rejects, notes) in plans.items():
        one = write_split(out / split, tuple(outputs), pictures, rejects, options)
        done.append(replace(one, notes=(*notes, *one.notes)))
    return publish(done)


def _plan(
    split: str, rows: list[Row], images: Path, options: ConversionOptions
) -> tuple[list[Picture], list[RejectedFile], list[str]]:
    pictures: list[Picture] = []
    rejects: list[RejectedFile] = []
    seen: dict[str, Row] = {}
    keys: set[str] = set()
    again = []
    for row in rows:
        name, file = resolve(split, row.name, images)
        assert file is not None
        if (place := member_name(name)) in seen:
            if seen[place].target != row.target:
                rejects.append(RejectedFile(name, "is listed again with another target"))
            else:
                again.append(name)
            continue
        seen[place] = row
        if row.problem or not file.is_file():
            rejects.append(RejectedFile(name, row.problem or why_absent(file)))
            continue
        path = PurePosixPath(name)
        key = path.with_name(path.stem.replace(".", "_")).as_posix()
        while key in keys:
            key += "-2"
        keys.add(key)
        pictures.append(Picture(file, name, key, None, row.target or {}, row.label_map))
    if rejects and not options.skip_broken:
        told = some([f"{reject.path}: {reject.reason}" for reject in rejects])
        raise ValueError(
            f"{split}: {len(rejects)} of {len(rows)} rows cannot be used ({told}); mend them, or list and "
            "leave them out with --skip-broken"
        )
    notes = [f"{len(again)} rows list a picture again, and are left out ({some(again)})"] if again else []
    return pictures, rejects, notes
