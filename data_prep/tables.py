"""From (name, class) lists to a split of tars: what the converters of lists and JSON share.

Knows no list's format. A name is a path inside an image root, or a member of an archive. Paths are compared
when they are resolved (`./a.jpg` is `a.jpg`), and names in one Unicode form.
"""

from __future__ import annotations

import os
import posixpath
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from selfmask_dist.common.text import some

from .options import ConversionOptions
from .shards import Conversion, check_target, member_name, publish, write_split
from .split_names import settle_classes
from .writer import Picture, RejectedFile

Listed = list[tuple[str, str | None]]  # (name, class name) of each picture; None: it has no label


@dataclass
class _Plan:
    """What a split's list comes to. absent: listed, and not there."""

    pictures: list[Picture] = field(default_factory=list)
    absent: list[RejectedFile] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def convert_lists(
    images: str | Path,
    splits: dict[str, Listed],
    out: str | Path,
    *,
    classes: Iterable[str] | None = None,
    options: ConversionOptions,
    notes: Mapping[str, Sequence[str]] | None = None,
) -> list[Conversion]:
    """Write a folder of tars for each split, under one list of classes, and return what was written.

    images: the folder that names start from, or a tar or tar.gz with members of those names.
    classes: in the order of their numbers; default: all that occur, sorted.
    notes: by split, what the reader of the lists has to say.
    Raises ValueError naming what is absent, listed under two classes, or unreadable.
    """
    images, out = Path(images), Path(out)
    if not images.exists():
        raise ValueError(f"{images}: no such folder or archive")
    listed_order = list(classes) if classes is not None else []
    # the training split's spelling of a class comes first
    rows = [row for split in sorted(splits, key=lambda name: name != "train") for row in splits[split]]
    found = dict.fromkeys(name for _, name in rows if name is not None)
    if classes is not None and (unknown := sorted(set(found) - set(listed_order))):
        raise ValueError(f"pictures are of classes that are not listed ({some(unknown)})")
    class_of, told = settle_classes(found, options.similar_classes, order=listed_order)
    order = tuple(
        [class_of[name] for name in listed_order] if classes is not None else sorted(set(class_of.values()))
    )
    if twice := [name for name, count in Counter(order).items() if count > 1]:
        raise ValueError(f"classes have the same name ({some(twice)}); rename one of each")
    archive = images if images.is_file() else None
    root = images if archive is None else None
    for split in splits:
        check_target(out / split, options.overwrite)
    plans = {split: _plan(split, listed, class_of, root, options) for split, listed in splits.items()}
    done = []
    for split, plan in plans.items():
        one = write_split(out / split, order, plan.pictures, plan.absent, options, archive=archive)
        known = (*(notes or {}).get(split, ()), *told, *plan.notes)
        done.append(replace(one, notes=(*known, *one.notes)))
    return publish(done)


def _plan(
    split: str, listed: Listed, class_of: dict[str, str], root: Path | None, options: ConversionOptions
) -> _Plan:
    plan = _Plan()
    keys: set[str] = set()
    label_of: dict[str, str | None] = {}
    repeated: list[str] = []
    relabelled: list[str] = []
    for written, class_name in listed:
        name, file = resolve(split, written, root)
        label = None if class_name is None else class_of[class_name]
        if (place := member_name(name)) in label_of:
            if label_of[place] == label:
                repeated.append(name)
            else:
                relabelled.append(f"{name} as {label_of[place]!r} and as {label!r}")
            continue
        label_of[place] = label
        path = PurePosixPath(name)
        key = path.with_name(path.stem.replace(".", "_")).as_posix()
        while key in keys:
            key += "-2"
        keys.add(key)
        if file is not None and not os.path.isfile(file):
            plan.absent.append(RejectedFile(name, why_absent(file)))
            continue
        plan.pictures.append(Picture(file, name, key, label))
    if relabelled:
        raise ValueError(
            f"{split}: {len(relabelled)} pictures are listed under two classes ({some(relabelled)}); keep one"
            " line of each"
        )
    if repeated:
        plan.notes.append(f"{len(repeated)} lines list a picture again, and are left out ({some(repeated)})")
    if plan.absent and not options.skip_broken:
        raise ValueError(
            f"{split}: {len(plan.absent)} of {len(listed)} listed pictures are absent in {root}"
            f" ({some([reject.path for reject in plan.absent])}); fetch them, or leave them out with"
            " --skip-broken"
        )
    return plan


def resolve(split: str, written: str, root: Path | None) -> tuple[str, Path | None]:
    """Return a picture's path inside the image root, and its file; None for a member of an archive.

    Raises:
        ValueError: it leads out of the root.
    """
    name = posixpath.normpath(written)
    if root is not None and posixpath.isabs(name):
        for start in (os.path.abspath(root), os.path.realpath(root)):
            if name.startswith(start + "/"):
                name = name.removeprefix(start + "/")
                break
    if posixpath.isabs(name) or name.split("/")[0] == "..":
        raise ValueError(f"{split}: {written} leads out of the image folder; give paths inside it")
    if root is None:
        return name, None
    # file systems and lists differ in the Unicode form of a name, and Windows writes another separator
    for form in (name, *(unicodedata.normalize(kind, name) for kind in ("NFC", "NFD"))):
        if os.path.lexists(root / form):
            return form, root / form
    if "\\" in name:
        return resolve(split, name.replace("\\", "/"), root)
    return name, root / name


def why_absent(file: Path) -> str:
    """Return why a listed picture cannot be read."""
    if os.path.islink(file):
        return f"listed, and a link to {os.readlink(file)}, which cannot be reached"
    return "listed, and no regular file" if os.path.exists(file) else "listed, and there is no such file"
