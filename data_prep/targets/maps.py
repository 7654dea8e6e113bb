"""A folder of pictures and one of PNG label maps -> WebDataset tars for dense work.

    python data_prep/targets/maps.py IMAGES MAPS OUT --classes background,cat,dog

The map of IMAGES/a/b.jpg is MAPS/a/b.png: one byte (grey or palette) a pixel, the number of its class in the
list, 255 for a pixel that does not count. PASCAL VOC's JPEGImages and SegmentationClass are such folders.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

if not __package__:  # started by its path: Python put this file's folder on the path, not the ones above it
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    __package__ = "data_prep.targets"

from selfmask_dist.common.pictures import EXTENSIONS

from ..command import add_options, run_converter
from ..options import ConversionOptions, OptionValues
from ..shards import Conversion
from .rows import Row, write_rows


def convert_maps(
    images: str | Path,
    maps: str | Path,
    out: str | Path,
    *,
    classes: Sequence[str],
    listed: str | Path | None = None,
    split: str = "train",
    **options: Unpack[OptionValues],
) -> list[Conversion]:
    """Convert the pictures of a folder that have a map into OUT/SPLIT.

    classes: names in the order of their numbers. listed: a text file with one name a line, without extension,
    of the pictures to take (VOC's ImageSets); None: all that have a map.
    Raises ValueError naming a listed picture without a map, or a map that does not fit its picture or has
    values that are no class.
    """
    root, place = Path(images), Path(maps)
    for folder in (root, place):
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder; give the folders of pictures and of maps")
    if not classes or not all(classes) or len(set(classes)) < len(classes):
        raise ValueError(f"--classes {','.join(classes)}: name each class once, in the order of its number")
    found = {
        path.relative_to(root).with_suffix("").as_posix(): path.relative_to(root).as_posix()
        for path in sorted(root.rglob("*"))
        if path.suffix.removeprefix(".").lower() in EXTENSIONS
    }
    with_map = {
        path.relative_to(place).with_suffix("").as_posix(): path for path in sorted(place.rglob("*.png"))
    }
    if listed is None:
        names = [name for name in found if name in with_map]
    else:
        lines = Path(listed).read_text(encoding="utf-8").splitlines()
        names = [line.split()[0] for line in lines if line.strip()]
    if not names:
        raise ValueError(f"no picture of {root} has a map of its name (.png) in {place}")
    rows = [
        Row(
            found.get(name, name),
            label_map=with_map.get(name),
            problem="" if name in with_map else f"has no map {name}.png in {place}",
        )
        for name in names
    ]
    return write_rows(root, {split: rows}, Path(out), classes, ConversionOptions(**options))


def main(argv: Sequence[str] | None = None, *, prog: str = "maps.py") -> int:
    """Run the command line, and return its exit status; `prog` is what its help calls it."""
    parser = argparse.ArgumentParser(
        prog=prog, description="Convert pictures and their PNG label maps into WebDataset tars."
    )
    parser.add_argument("images", help="folder of pictures")
    parser.add_argument("maps", help="folder of maps: the same names, .png")
    parser.add_argument("out", help="folder to write; one subfolder for the split")
    parser.add_argument(
        "--classes", required=True, metavar="A,B,...", help="names in the order of their numbers"
    )
    parser.add_argument(
        "--list", dest="listed", metavar="FILE", help="names of the pictures to take, one a line"
    )
    parser.add_argument("--split", default="train", help="the subfolder's name (train)")
    add_options(parser)
    return run_converter(_convert, parser, argv)


def _convert(*, classes: str, **arguments: Any) -> list[Conversion]:
    return convert_maps(**arguments, classes=[name.strip() for name in classes.split(",")])


if __name__ == "__main__":
    sys.exit(main())
