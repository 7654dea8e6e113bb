"""Whether a folder holds splits or classes: read from names and depth, and asked where both are possible.

Knows no pictures. A folder is taken for a split where it is called like one and holds folders, so that a
class may be called "train" (of vehicles) as long as its pictures lie in it directly.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Literal

from selfmask_dist.common.class_names import normal_name
from selfmask_dist.common.text import some

from .folder_tree import look_into, tree_text
from .split_names import resembles_split, split_of

Layout = Literal["auto", "splits", "classes", "unlabelled"]
LAYOUTS = ("auto", "splits", "classes", "unlabelled")


def find_splits(src: Path, layout: Layout) -> tuple[dict[str, Path], list[str]]:
    """Return split name -> its folder of class folders, and notes; the name is "" where `src` is that folder.

    Splits are called train, val and test, whatever their folders are called.

    Raises:
        ValueError: the tree can be read in two ways and `layout` is "auto"; it shows the tree and the option.
    """
    if not src.is_dir():
        raise ValueError(f"{src}: no such folder")
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; choose from {', '.join(LAYOUTS)}")
    folders = look_into(src).folders
    called = {folder: split for folder in folders if (split := split_of(folder.name)) is not None}
    alike = {folder: split for folder in folders if (split := resembles_split(folder.name)) is not None}
    if layout in ("classes", "unlabelled"):
        return {"": src}, []
    if layout == "splits":
        return _as_told(src, folders, alike | called)
    deep = [folder for folder in called if look_into(folder).folders]
    _check_is_clear(src, folders, called, deep)
    _check_sound(src, [folder for folder in alike if folder not in called])
    if not deep:
        names = some([folder.name for folder in called])
        return {"": src}, [f"{names}: a class, as pictures lie in it directly"] if called else []
    return {called[folder]: folder for folder in deep}, []


def _as_told(src: Path, folders: list[Path], called: dict[Path, str]) -> tuple[dict[str, Path], list[str]]:
    """Take every folder that is called like a split; two for one split keep their own names."""
    if not called:
        raise ValueError(
            f"{src} has no folder that is called like a split (train, val, test);\n{tree_text(src)}"
        )
    counts = Counter(called.values())
    own = {folder: normal_name(folder.name).casefold() for folder in called}
    splits = {(split if counts[split] == 1 else own[folder]): folder for folder, split in called.items()}
    if len(splits) < len(called):
        raise ValueError(
            f"{src} has two folders for one split ({some([folder.name for folder in called])}); rename one"
        )
    others = [folder.name for folder in folders if folder not in called]
    if not others:
        return splits, []
    return splits, [f"{len(others)} folders that are no splits are left out ({some(others)})"]


def _check_sound(src: Path, alike: list[Path]) -> None:
    """Check that folders whose names sound like splits, such as train2017 and val2017, are no splits.

    Raises:
        ValueError: at least two of them hold folders and no pictures of their own.
    """
    deep = [folder for folder in alike if (found := look_into(folder)).folders and not found.files]
    if len(deep) > 1:
        raise ValueError(
            f"{src} holds folders that sound like splits ({some([folder.name for folder in deep])}); say "
            f"which they are with --layout splits or --layout classes, or rename them to train, val and test:"
            f"\n{tree_text(src)}"
        )


def _check_is_clear(src: Path, folders: list[Path], called: dict[Path, str], deep: list[Path]) -> None:
    why = None
    others = [folder.name for folder in folders if folder not in deep]
    counts = Counter(called[folder] for folder in deep)
    twice = [folder.name for folder in deep if counts[called[folder]] > 1]
    if deep and others:
        names = some([folder.name for folder in deep])
        why = f"{src} holds splits ({names}) and other folders ({some(others)})"
    elif twice:
        why = f"{src} holds {' and '.join(twice)}, which are names of one split"
    elif called and not deep and len(called) == len(folders):
        why = f"{src} holds {some(others)}, called like splits, with pictures and no class folders in them"
    elif not deep:
        inside = [
            f"{folder.name}/{below.name}"
            for folder in folders
            for below in look_into(folder).folders
            if split_of(below.name) is not None
        ]
        if inside:
            why = f"{src} holds folders that hold splits ({some(inside)}), so they are perhaps no classes"
    if why is not None:
        raise ValueError(
            f"{why}; say which they are with --layout splits or --layout classes, or move folders:"
            f"\n{tree_text(src)}"
        )
