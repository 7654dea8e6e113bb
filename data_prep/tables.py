"""From (name, class) lists to a split of tars: what the converters of lists and JSON share.

Knows no list's format. A name is a path inside an image root, or a member of an archive.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from .options import ConversionOptions
from .shards import Conversion, check_target, publish, write_split
from .writer import Picture, RejectedFile, some

Listed = list[tuple[str, str]]  # (name, class name) of each picture


def convert_lists(
    images: str | Path,
    splits: dict[str, Listed],
    out: str | Path,
    *,
    classes: Iterable[str] | None = None,
    options: ConversionOptions,
) -> list[Conversion]:
    """Write a folder of tars for each split, under one list of classes, and return what was written.

    images: the folder that names start from, or a tar or tar.gz with members of those names.
    classes: in the order of their numbers; default: all that occur, sorted.
    Raises ValueError naming what is absent, listed twice, or unreadable.
    """
    images, out = Path(images), Path(out)
    if not images.exists():
        raise ValueError(f"{images}: no such folder or archive")
    found = sorted({name for listed in splits.values() for _, name in listed})
    order = tuple(classes) if classes is not None else tuple(found)
    if unknown := sorted(set(found) - set(order)):
        raise ValueError(f"pictures are of classes that are not listed ({some(unknown)})")
    if twice := [name for name, count in Counter(order).items() if count > 1]:
        raise ValueError(f"classes have the same name ({some(twice)}); rename one of each")
    archive = images if images.is_file() else None
    root = images if archive is None else None
    for split in splits:
        check_target(out / split, options.overwrite)
    plans = {split: _pictures(split, listed, root, options) for split, listed in splits.items()}
    return publish(
        [write_split(out / split, order, *plan, options, archive=archive) for split, plan in plans.items()]
    )


def _pictures(
    split: str, listed: Listed, root: Path | None, options: ConversionOptions
) -> tuple[list[Picture], list[RejectedFile]]:
    names: set[str] = set()
    keys: set[str] = set()
    pictures: list[Picture] = []
    absent: list[RejectedFile] = []
    for name, class_name in listed:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{split}: {name} leads out of the image folder; give paths inside it")
        if name in names:
            raise ValueError(f"{split}: {name} is listed twice")
        names.add(name)
        key = path.with_name(path.stem.replace(".", "_")).as_posix()
        while key in keys:
            key += "-2"
        keys.add(key)
        file = None if root is None else root / name
        if file is not None and not file.is_file():
            absent.append(RejectedFile(name, "listed, and there is no such file"))
            continue
        pictures.append(Picture(file, name, key, class_name))
    if absent and not options.skip_broken:
        raise ValueError(
            f"{split}: {len(absent)} of {len(listed)} listed pictures are absent in {root}"
            f" ({some([reject.path for reject in absent])}); fetch them, or leave them out with --skip-broken"
        )
    return pictures, absent
