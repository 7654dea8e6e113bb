"""An image folder -> WebDataset tars: `python data_prep/image_folder.py SRC OUT`.

    SRC/<class>/**/*.jpg          ->  OUT/shard-000000.tar ..., OUT/dataset.json
    SRC/<split>/<class>/**/*.jpg  ->  OUT/<split>/shard-000000.tar ..., one class list for all splits

Pictures may lie deeper inside a class folder; hidden files are left out. `shards` says what a tar holds.
Knows folders, and nothing of torch, backbones or training.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

if not __package__:  # started by its path: Python put this file's folder on the path, not the one above it
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    __package__ = "data_prep"

from .command import add_options, run_converter
from .options import ConversionOptions, OptionValues
from .shards import Conversion, check_target, publish, write_split
from .writer import Picture, RejectedFile, some

SPLITS = ("train", "val", "valid", "validation", "test")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")


def convert_image_folder(
    src: str | Path,
    out: str | Path,
    *,
    split: str | None = None,
    **options: Unpack[OptionValues],
) -> list[Conversion]:
    """Convert `src` into tars under `out`, and return a `Conversion` for each split.

    split: with split folders in `src`, convert only this one; without, the folder to write to (`out/split`).
    Raises ValueError naming the file or folder: nothing to convert, a class without pictures, a file that is
    no picture, an output folder that is not empty.
    """
    src, out = Path(src), Path(out)
    chosen = ConversionOptions(**options)
    if out.resolve().is_relative_to(src.resolve()):
        raise ValueError(f"{out} lies inside {src}, where it would be taken for a class; write elsewhere")
    folders = _find_splits(src)
    classes = tuple(sorted({folder.name for root in folders.values() for folder in _subfolders(root)}))
    folders = _choose_split(src, folders, split)
    targets = {name: out / name for name in folders}
    for target in targets.values():
        check_target(target, chosen.overwrite)
    listed = {name: _list_pictures(src, root, chosen) for name, root in folders.items()}
    return publish([write_split(targets[name], classes, *listed[name], chosen) for name in folders])


def _find_splits(src: Path) -> dict[str, Path]:
    """Return each split's folder of class folders, by its name; "" where `src` itself is that folder."""
    if not src.is_dir():
        raise ValueError(f"{src}: no such folder")
    folders = _subfolders(src)
    # a folder called "train" that holds pictures and no folders is a class (of vehicles)
    splits = {folder.name: folder for folder in folders if folder.name in SPLITS and _subfolders(folder)}
    if not splits:
        return {"": src}
    others = [folder.name for folder in folders if folder.name not in splits]
    if others:
        raise ValueError(
            f"{src} holds splits ({', '.join(splits)}) and other folders ({some(others)});"
            " move the others away"
        )
    return splits


def _choose_split(src: Path, folders: dict[str, Path], split: str | None) -> dict[str, Path]:
    if split is None:
        return folders
    if split in ("", ".", "..") or "/" in split:
        raise ValueError(f"split is {split!r}; it must be the name of a folder")
    if "" in folders:
        return {split: folders[""]}
    if split not in folders:
        raise ValueError(f"{src} has no split {split!r}, it has {', '.join(folders)}")
    return {split: folders[split]}


def _list_pictures(
    src: Path, root: Path, options: ConversionOptions
) -> tuple[list[Picture], list[RejectedFile]]:
    """Return every picture below the class folders of `root`, by path, and the files that are none."""
    loose = [path.name for path in _files(root, deep=False) if path.suffix.lower() in EXTENSIONS]
    if loose:
        raise ValueError(f"{root} has pictures outside of class folders ({some(loose)}); move them into one")
    pictures: list[Picture] = []
    rejects: list[RejectedFile] = []
    for folder in _subfolders(root):
        taken: set[str] = set()
        found = len(pictures)
        for path in _files(folder, deep=True):
            name = path.relative_to(src).as_posix()
            if path.suffix.lower() not in EXTENSIONS:
                rejects.append(RejectedFile(name, f"not a picture by its name ({', '.join(EXTENSIONS)})"))
                continue
            key = _free_key(path.relative_to(root), taken)
            taken.add(key)
            pictures.append(Picture(path, name, key, folder.name))
        if len(pictures) == found:
            raise ValueError(f"{folder}: a class folder without pictures; add some or remove the folder")
    if not pictures:
        raise ValueError(f"{root}: no class folders with pictures; expected {root}/CLASS/PICTURE.jpg")
    if rejects and not options.skip_broken:
        raise ValueError(
            f"{root} holds files that are not pictures ({some([reject.path for reject in rejects])});"
            " remove them, or list and leave them out with --skip-broken"
        )
    return pictures, rejects


def _free_key(path: Path, taken: set[str]) -> str:
    """Return a key for the file: WebDataset's end at the first dot, and `a.jpg` and `a.png` need two."""
    stem = path.with_name(path.stem.replace(".", "_")).as_posix()
    key, number = stem, 1
    while key in taken:
        number += 1
        key = f"{stem}-{number}"
    return key


def _subfolders(folder: Path) -> list[Path]:
    """Return the folders in a folder by name, hidden ones left out."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _files(folder: Path, *, deep: bool) -> list[Path]:
    """Return the files in a folder by path, hidden ones left out.

    deep: those of its subfolders too; links are followed.
    """
    found: list[Path] = []
    for root, folders, names in os.walk(folder, followlinks=True):
        found += [Path(root, name) for name in names if not name.startswith(".")]
        folders[:] = [name for name in folders if deep and not name.startswith(".")]
    return sorted(found)


def main(argv: Sequence[str] | None = None, *, prog: str = "image_folder.py") -> int:
    """Run the command line, and return its exit status; `prog` is what its help calls it."""
    parser = argparse.ArgumentParser(prog=prog, description="Convert an image folder into WebDataset tars.")
    parser.add_argument(
        "src", help="folder of CLASS/PICTURE, or of SPLIT/CLASS/PICTURE with splits train, val, test"
    )
    parser.add_argument("out", help="folder to write; must be empty or absent")
    parser.add_argument(
        "--split", help="convert only this split; for a SRC without splits, the name of OUT's subfolder"
    )
    add_options(parser)
    return run_converter(convert_image_folder, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
