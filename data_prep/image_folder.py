"""An image folder -> WebDataset tars: `python data_prep/image_folder.py SRC OUT`.

    SRC/<class>/**/*.jpg          ->  OUT/shard-000000.tar ..., OUT/dataset.json
    SRC/<split>/<class>/**/*.jpg  ->  OUT/<split>/shard-000000.tar ..., one class list for all splits
    SRC/**/*.jpg                  ->  OUT/shard-000000.tar ..., no labels (layout "unlabelled")

`layout` says which of the first two a folder is. Pictures may lie deeper inside a class folder; hidden files
are left out. `shards` says what a tar holds. With --once, OUT/<split> is made and indexed by the first call,
and found again by the next one (`prepared.once`). Knows folders, and nothing of torch, backbones or training.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Unpack

if not __package__:  # started by its path: Python put this file's folder on the path, not the one above it
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    __package__ = "data_prep"

from selfmask_dist.common.text import some

from .command import add_options, run_converter
from .folder_tree import is_picture, look_below, look_into
from .layout import LAYOUTS, Layout, find_splits
from .options import ConversionOptions, OptionValues
from .prepared.once import convert_once, make_index
from .shards import Conversion, check_target, publish, write_split
from .split_names import settle_classes, split_of
from .writer import Picture, RejectedFile


@dataclass
class _Listing:
    """What a split's folder holds. pictures: by path. rejects: what cannot be read, or is no picture."""

    pictures: list[Picture] = field(default_factory=list)
    rejects: list[RejectedFile] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def convert_image_folder(
    src: str | Path,
    out: str | Path,
    *,
    split: str | None = None,
    layout: Layout = "auto",
    **options: Unpack[OptionValues],
) -> list[Conversion]:
    """Convert `src` into tars under `out`, and return a `Conversion` for each split.

    split: with split folders in `src`, convert only this one; without, the folder to write to (`out/split`).
    layout: what the folders in `src` are; "auto" reads it from their names and depth, "unlabelled" takes
        every picture, in whatever folder, without a label.
    Raises ValueError naming the file or folder: nothing to convert, a tree that can be read in two ways, a
    class without pictures, a file that is no picture, an output folder that is not empty.
    """
    src, out = Path(src), Path(out)
    chosen = ConversionOptions(**options)
    if out.resolve().is_relative_to(src.resolve()):
        raise ValueError(f"{out} lies inside {src}, where it would be taken for a class; write elsewhere")
    folders, notes = find_splits(src, layout)
    # the training split's spelling of a class comes first
    roots = sorted(folders, key=lambda name: name != "train")
    named = [folder.name for name in roots for folder in look_into(folders[name]).folders]
    named = [] if layout == "unlabelled" else named
    class_of, told = settle_classes(named, chosen.similar_classes)
    classes = tuple(sorted(set(class_of.values())))
    if len(classes) == 1:
        told.append(f"there is one class ({classes[0]}): every accuracy on these pictures is 1")
    folders = _choose_split(src, folders, split)
    targets = {name: out / name for name in folders}
    for target in targets.values():
        check_target(target, chosen.overwrite)
    if layout == "unlabelled":
        listed = {name: _list_unlabelled(root, chosen) for name, root in folders.items()}
    else:
        listed = {name: _list_pictures(src, root, class_of, chosen) for name, root in folders.items()}
    done = []
    for name, found in listed.items():
        conversion = write_split(targets[name], classes, found.pictures, found.rejects, chosen)
        done.append(replace(conversion, notes=(*notes, *told, *found.notes, *conversion.notes)))
    return publish(done)


def convert_folder_once(
    src: str | Path,
    out: str | Path,
    *,
    split: str | None = None,
    layout: Layout = "auto",
    **options: Unpack[OptionValues],
) -> list[Conversion]:
    """Convert one split of `src` into `out/split` and index it, unless an earlier call did.

    split: as in `convert_image_folder`; by default "train". `prepared.once` says what is found again.
    Raises ValueError where `convert_image_folder` does, and where `src` changed since.
    """
    src, out, name = Path(src), Path(out), split or "train"

    def convert(overwrite: bool) -> list[Conversion]:
        chosen: OptionValues = {**options, "overwrite": overwrite}
        return convert_image_folder(src, out, split=name, layout=layout, **chosen)

    if not src.is_dir():
        raise ValueError(f"{src}: no such folder")
    if out.resolve().is_relative_to(src.resolve()):
        raise ValueError(f"{out} lies inside {src}, where it would be taken for pictures; write elsewhere")
    done = convert_once(src, out, name, layout=layout, convert=convert)
    for conversion in done:
        make_index(conversion.folder, has_labels=bool(conversion.classes))
    return done


def _choose_split(src: Path, folders: dict[str, Path], split: str | None) -> dict[str, Path]:
    if split is None:
        return folders
    if split in ("", ".", "..") or "/" in split:
        raise ValueError(f"split is {split!r}; it must be the name of a folder")
    if "" in folders:
        return {split: folders[""]}
    name = split if split in folders else split_of(split) or split
    if name not in folders:
        raise ValueError(f"{src} has no split {split!r}, it has {', '.join(folders)}")
    return {name: folders[name]}


def _list_pictures(src: Path, root: Path, class_of: dict[str, str], options: ConversionOptions) -> _Listing:
    """Return every picture below the class folders of `root`, by path, and the files that are none."""
    top = look_into(root)
    loose = [path.name for path in top.files if is_picture(path)]
    if loose:
        raise ValueError(
            f"{root} has pictures outside of class folders ({some(loose)}); move them into one, or take all "
            f"pictures without labels with --layout unlabelled"
        )
    listing = _Listing(rejects=_broken(src, top.broken), notes=top.notes(src))
    if top.files:
        names = some([path.name for path in top.files])
        listing.notes.append(f"{len(top.files)} files outside of class folders are left out ({names})")
    for folder in top.folders:
        found = look_below(folder, src, root)
        pictures = [path for path in found.files if is_picture(path)]
        foreign = [(path, "not a picture by its name or its first bytes") for path in found.files]
        listing.rejects += _broken(src, found.broken)
        listing.rejects += _broken(src, [entry for entry in foreign if entry[0] not in {*pictures}])
        listing.notes += [f"{folder.name}: {note}" for note in found.notes(src)]
        if not pictures and not found.broken:
            raise ValueError(f"{folder}: a class folder without pictures; add some or remove the folder")
        taken: set[str] = set()
        for path in pictures:
            key = _free_key(path.relative_to(root), taken)
            taken.add(key)
            name = path.relative_to(src).as_posix()
            listing.pictures.append(Picture(path, name, key, class_of[folder.name]))
    if not options.skip_broken:
        _refuse(root, listing.rejects)
    if not listing.pictures:
        raise ValueError(f"{root}: no class folders with pictures; expected {root}/CLASS/PICTURE.jpg")
    return listing


def _list_unlabelled(root: Path, options: ConversionOptions) -> _Listing:
    """Return every picture below a folder, by path and without a label, and the files that are none."""
    found = look_below(root)
    pictures = [path for path in found.files if is_picture(path)]
    foreign = {*found.files} - {*pictures}
    listing = _Listing(rejects=_broken(root, found.broken), notes=found.notes(root))
    listing.rejects += _broken(
        root, [(path, "not a picture by its name or its first bytes") for path in sorted(foreign)]
    )
    taken: set[str] = set()
    for path in pictures:
        name = path.relative_to(root).as_posix()
        key = _free_key(Path(name.replace("/", "__")), taken)  # a key's folder would be taken for a class
        taken.add(key)
        listing.pictures.append(Picture(path, name, key, None))
    if not options.skip_broken:
        _refuse(root, listing.rejects)
    if not listing.pictures:
        raise ValueError(f"{root}: no pictures, in it or in its folders")
    return listing


def _broken(src: Path, entries: Iterable[tuple[Path, str]]) -> list[RejectedFile]:
    return [RejectedFile(path.relative_to(src).as_posix(), reason) for path, reason in entries]


def _refuse(root: Path, rejects: list[RejectedFile]) -> None:
    foreign = [reject.path for reject in rejects if reject.reason.startswith("not a picture")]
    unreadable = [f"{reject.path} {reject.reason}" for reject in rejects if reject.path not in {*foreign}]
    told = [
        *([f"files that are not pictures ({some(foreign)})"] if foreign else []),
        *([f"what cannot be read ({some(unreadable)})"] if unreadable else []),
    ]
    if told:
        raise ValueError(
            f"{root} holds {' and '.join(told)}; remove them, or list and leave them out with --skip-broken"
        )


def _free_key(path: Path, taken: set[str]) -> str:
    """Return a key for the file: WebDataset's end at the first dot, and `a.jpg` and `a.png` need two."""
    stem = path.with_name(path.stem.replace(".", "_")).as_posix()
    key, number = stem, 1
    while key in taken:
        number += 1
        key = f"{stem}-{number}"
    return key


def main(argv: Sequence[str] | None = None, *, prog: str = "image_folder.py") -> int:
    """Run the command line, and return its exit status; `prog` is what its help calls it."""
    parser = argparse.ArgumentParser(prog=prog, description="Convert an image folder into WebDataset tars.")
    parser.add_argument(
        "src", help="folder of CLASS/PICTURE, or of SPLIT/CLASS/PICTURE with splits train, val, test"
    )
    parser.add_argument("out", help="folder to write; must be empty or absent")
    parser.add_argument(
        "--layout",
        choices=LAYOUTS,
        default="auto",
        help="what the folders in SRC are, where their names and depth leave it open",
    )
    parser.add_argument(
        "--split", help="convert only this split; for a SRC without splits, the name of OUT's subfolder"
    )
    parser.add_argument(
        "--once",
        action="store_true",
        help="make OUT/SPLIT (train by default) with its index, or find it as an earlier call made it",
    )
    add_options(parser)
    return run_converter(_convert, parser, argv)


def _convert(*, once: bool, **arguments: Any) -> list[Conversion]:
    fn = convert_folder_once if once else convert_image_folder
    return fn(**arguments)


if __name__ == "__main__":
    sys.exit(main())
