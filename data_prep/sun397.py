"""SUN397 and its partition lists -> WebDataset tars.

    python data_prep/sun397.py SUN397 OUT --partition 1 [--lists Partitions]

SUN397 holds ClassName.txt (lines such as /a/apartment_building/outdoor) and a tree of that form; the lists
Training_01.txt and Testing_01.txt name pictures by the same paths. A class is called by its path without the
first letter: `apartment_building/outdoor`. Knows nothing of torch or training.
"""

from __future__ import annotations

import argparse
import posixpath
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

if not __package__:  # started by its path: Python put this file's folder on the path, not the one above it
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    __package__ = "data_prep"

from .command import add_options, run_converter
from .options import ConversionOptions, OptionValues
from .shards import Conversion
from .tables import Listed, convert_lists


def convert_sun397(
    src: str | Path,
    out: str | Path,
    *,
    partition: int = 1,
    lists: str | Path | None = None,
    **options: Unpack[OptionValues],
) -> list[Conversion]:
    """Convert one of the ten partitions into `out/train` and `out/test`.

    lists: folder of the lists, default `src`. Raises ValueError naming what is absent or of no class.
    """
    if not 1 <= partition <= 10:
        raise ValueError(f"partition is {partition}; there are 1 to 10")
    src, folder = Path(src), Path(lists or src)
    paths = [_path(line) for line in _lines(src / "ClassName.txt")]
    classes = {path: _class_name(path) for path in paths}
    splits = {
        "train": _listed(folder / f"Training_{partition:02d}.txt", classes),
        "test": _listed(folder / f"Testing_{partition:02d}.txt", classes),
    }
    return convert_lists(
        src,
        splits,
        out,
        classes=classes.values(),
        options=ConversionOptions(**options),
    )


def _class_name(path: str) -> str:
    """Return a path without its first letter: a/apartment_building/outdoor is apartment_building/outdoor."""
    first, _, rest = path.partition("/")
    return rest if len(first) == 1 and rest else path


def _path(line: str) -> str:
    """/a/abbey/sun_1.jpg -> a/abbey/sun_1.jpg, in one Unicode form and with one kind of separator."""
    return posixpath.normpath(unicodedata.normalize("NFC", line.replace("\\", "/")).strip("/"))


def _listed(path: Path, classes: dict[str, str]) -> Listed:
    listed: Listed = []
    for line in _lines(path):
        name = _path(line)
        folder = name.rpartition("/")[0]
        if folder not in classes:
            raise ValueError(f"{path}: {line} is of no class in ClassName.txt")
        listed.append((name, classes[folder]))
    return listed


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable list ({error})") from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise ValueError(f"{path}: it is empty; fetch it again")
    return found


def main(argv: Sequence[str] | None = None, *, prog: str = "sun397.py") -> int:
    """Run the command line, and return its exit status; `prog` is what its help calls it."""
    parser = argparse.ArgumentParser(prog=prog, description="Convert SUN397 into WebDataset tars.")
    parser.add_argument("src", help="the folder SUN397, with ClassName.txt")
    parser.add_argument("out", help="folder to write: train and test")
    parser.add_argument("--partition", type=int, default=1, metavar="N", help="which of the ten lists (1)")
    parser.add_argument("--lists", metavar="DIR", help="folder of Training_NN.txt and Testing_NN.txt")
    add_options(parser)
    return run_converter(convert_sun397, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
