"""A CSV file that lists pictures -> WebDataset tars.

    python data_prep/csv_manifest.py LIST.csv IMAGES OUT

with a head line that names the columns `path`, `label` (a class name) and, if there are several, `split`.
IMAGES is the folder that paths start from, or a tar. Knows nothing of torch or training.
"""

from __future__ import annotations

import argparse
import csv
import sys
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


def convert_csv(
    manifest: str | Path,
    images: str | Path,
    out: str | Path,
    **options: Unpack[OptionValues],
) -> list[Conversion]:
    """Convert every split that the list names ("train" where it names none), under one list of classes.

    Raises ValueError naming the line: a column that is absent, an empty field, one too many.
    """
    return convert_lists(
        images,
        _read(Path(manifest)),
        out,
        options=ConversionOptions(**options),
    )


def _read(path: Path) -> dict[str, Listed]:
    """Return for each split what is listed for it."""
    splits: dict[str, Listed] = {}
    try:
        # -sig: spreadsheets write a byte order mark, which would be part of the first column's name
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            lacking = [name for name in ("path", "label") if name not in (rows.fieldnames or [])]
            if lacking:
                raise ValueError(f"no column {' and '.join(lacking)} in its head line {rows.fieldnames}")
            for row in rows:
                name, label, split = row["path"], row["label"], row.get("split", "train")
                if not name or not label or not split or "/" in split or split in (".", ".."):
                    raise ValueError(f"line {rows.line_num}: a field is empty or no name")
                if None in row:
                    raise ValueError(f"line {rows.line_num}: more fields than columns; quote commas")
                splits.setdefault(split, []).append((name, label))
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"{path}: {error}") from error
    if not splits:
        raise ValueError(f"{path}: lists no pictures")
    return splits


def main(argv: Sequence[str] | None = None, *, prog: str = "csv_manifest.py") -> int:
    """Run the command line, and return its exit status; `prog` is what its help calls it."""
    parser = argparse.ArgumentParser(
        prog=prog, description="Convert a list of pictures into WebDataset tars."
    )
    parser.add_argument("manifest", help="CSV file with columns path, label and perhaps split")
    parser.add_argument("images", help="folder that paths start from, or a tar")
    parser.add_argument("out", help="folder to write; one subfolder for each split")
    add_options(parser)
    return run_converter(convert_csv, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
