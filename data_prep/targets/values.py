"""A CSV file of pictures and numbers -> WebDataset tars for a regression.

    python data_prep/targets/values.py LIST.csv IMAGES OUT --value price --value weight

with a head line that names the column `path`, the columns of numbers, and, if there are several, `split`.
Usual other names of these columns are known; see `csv_manifest`.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

if not __package__:  # started by its path: Python put this file's folder on the path, not the ones above it
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    __package__ = "data_prep.targets"

from ..command import add_options, run_converter
from ..csv_manifest import columns_of, delimiter_of, text_of
from ..options import ConversionOptions, OptionValues
from ..shards import Conversion
from ..split_names import split_of
from .rows import Row, write_rows


def convert_values(
    manifest: str | Path,
    images: str | Path,
    out: str | Path,
    *,
    values: Sequence[str],
    **options: Unpack[OptionValues],
) -> list[Conversion]:
    """Convert every split that the list names ("train" where it names none).

    values: the columns of numbers, in the order in which they are kept.
    Raises ValueError naming the line: a column that is absent, an empty path; see `write_rows` for a
    field that is no number.
    """
    path = Path(manifest)
    splits = _read(path, list(values))
    return write_rows(Path(images), splits, Path(out), list(values), ConversionOptions(**options))


def _read(path: Path, values: list[str]) -> dict[str, list[Row]]:
    splits: dict[str, list[Row]] = {}
    try:
        text = text_of(path)
        rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter_of(text), strict=True)
        head = [name for name in rows.fieldnames or [] if name is not None]
        names = columns_of(head, {}, roles=("path", "split"))
        written = {name.strip(): name for name in head}
        if absent := [name for name in values if name not in written]:
            raise ValueError(f"no column {absent[0]!r} in its head line {head}; name it with --value")
        for row in rows:
            if None in row:
                raise ValueError(f"line {rows.line_num}: more fields than columns; quote commas")
            name = (row[names["path"]] or "").strip()
            split = (row[names["split"]] or "").strip() if "split" in names else "train"
            if not name or not split or "/" in split or split in (".", ".."):
                raise ValueError(f"line {rows.line_num}: its path or split is empty or no name")
            fields = {value: row[written[value]] for value in values}
            splits.setdefault(split_of(split) or split, []).append(_row(name, fields, rows.line_num))
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"{path}: {error}") from error
    if not splits:
        raise ValueError(f"{path}: lists no pictures")
    return splits


def _row(name: str, fields: dict[str, str | None], line: int) -> Row:
    """Return the row of a line, with its problem where a field is no finite number."""
    numbers = []
    for column, text in fields.items():
        try:
            number = float((text or "").strip())
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            return Row(name, problem=f"line {line}: {column} is {text!r}, no finite number")
        numbers.append(number)
    return Row(name, {"value": numbers[0]} if len(numbers) == 1 else {"values": numbers})


def main(argv: Sequence[str] | None = None, *, prog: str = "values.py") -> int:
    """Run the command line, and return its exit status; `prog` is what its help calls it."""
    parser = argparse.ArgumentParser(
        prog=prog, description="Convert a CSV list of pictures and numbers into WebDataset tars."
    )
    parser.add_argument("manifest", help="CSV file with the column path, columns of numbers, perhaps split")
    parser.add_argument("images", help="folder that paths start from")
    parser.add_argument("out", help="folder to write; one subfolder for each split")
    parser.add_argument(
        "--value",
        dest="values",
        action="append",
        required=True,
        metavar="COLUMN",
        help="column of numbers; again for several",
    )
    add_options(parser)
    return run_converter(_convert, parser, argv)


def _convert(**arguments: Any) -> list[Conversion]:
    return convert_values(**arguments)


if __name__ == "__main__":
    sys.exit(main())
