"""A CSV file that lists pictures -> WebDataset tars.

    python data_prep/csv_manifest.py LIST.csv IMAGES OUT

with a head line that names the columns `path`, `label` (a class name) and, if there are several, `split`.
Usual other names of these columns are known, commas, semicolons and tabs separate fields, and a label of -1
says that a picture has none. IMAGES is the folder that paths start from, or a tar. Knows nothing of torch or
training.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

if not __package__:  # started by its path: Python put this file's folder on the path, not the one above it
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    __package__ = "data_prep"

from selfmask_dist.common.class_names import similar_names, similar_text

from .command import add_options, run_converter
from .options import ConversionOptions, OptionValues
from .shards import Conversion
from .split_names import misspelt_split, split_of
from .tables import Listed, convert_lists

_COLUMNS = {  # role -> what else such a column is called
    "path": (
        "file",
        "filename",
        "file_name",
        "filepath",
        "file_path",
        "image",
        "image_path",
        "img",
        "img_path",
    ),
    "label": ("class", "class_name", "classname", "category", "target", "label_name"),
    "split": ("set", "subset", "partition"),
}


def convert_csv(
    manifest: str | Path,
    images: str | Path,
    out: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    **options: Unpack[OptionValues],
) -> list[Conversion]:
    """Convert every split that the list names ("train" where it names none), under one list of classes.

    columns: what the columns `path`, `label` and `split` are called in the list, where that is not clear.
    Raises ValueError naming the line: a column that is absent, an empty field, one too many.
    """
    splits, notes = _read(Path(manifest), columns or {})
    return convert_lists(images, splits, out, options=ConversionOptions(**options), notes=notes)


def _read(path: Path, columns: Mapping[str, str]) -> tuple[dict[str, Listed], dict[str, list[str]]]:
    """Return what is listed for each split, and notes on each split."""
    splits: dict[str, Listed] = {}
    written: dict[str, str] = {}
    try:
        text = text_of(path)
        rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter_of(text), strict=True)
        names = columns_of(rows.fieldnames or [], columns)
        for row in rows:
            if None in row:
                raise ValueError(f"line {rows.line_num}: more fields than columns; quote commas")
            fields = {role: (row[name] or "").strip() for role, name in names.items()}
            fields.setdefault("split", "train")
            if not all(fields.values()) or fields["label"].casefold() in ("nan", "<na>"):
                raise ValueError(
                    f"line {rows.line_num}: a field is empty or no name; a label of -1 says that it has none"
                )
            name = fields["split"]
            if "/" in name or name in (".", ".."):
                raise ValueError(f"line {rows.line_num}: a field is empty or no name (split {name!r})")
            split = split_of(name) or name
            if written.setdefault(split, name.casefold()) != name.casefold():
                raise ValueError(
                    f"line {rows.line_num}: {written[split]!r} and {name!r} are names of one split; write one"
                )
            label = None if fields["label"] == "-1" else fields["label"]
            splits.setdefault(split, []).append((fields["path"], label))
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"{path}: {error}") from error
    if not splits:
        raise ValueError(f"{path}: lists no pictures")
    if alike := similar_names(splits):
        raise ValueError(f"{path}: splits have names that look like one ({similar_text(alike)}); write one")
    notes = {
        split: [f"split {written[split]!r} of the list is written as {split!r}"]
        for split in splits
        if written.get(split, split) != split.casefold()
    }
    for split in splits:
        if near := misspelt_split(split):
            text = f"split {split!r} is none of train, val and test, and is written as it is"
            notes.setdefault(split, []).append(f"{text}; did you mean {near}?")
    return splits, notes


def text_of(path: Path) -> str:
    """Return what a list says, whatever a spreadsheet wrote it in."""
    # -sig: spreadsheets write a byte order mark, which would be part of the first column's name
    content = path.read_bytes()
    return content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")


def delimiter_of(text: str) -> str:
    """Return the sign among comma, semicolon, tab and bar that stands most often in the head line."""
    head = text.lstrip("\r\n").partition("\n")[0]
    return max(",;\t|", key=head.count)


def columns_of(
    written: Sequence[str], chosen: Mapping[str, str], *, roles: Sequence[str] = tuple(_COLUMNS)
) -> dict[str, str]:
    """Return the name of each role's column: the chosen one, else its own, else a usual other one.

    Raises:
        ValueError: a column is absent, or two may be it.
    """
    plain = {name: name.strip().casefold().replace(" ", "_") for name in written if name is not None}
    found = {}
    for role in roles:
        others = _COLUMNS[role]
        if role in chosen:
            fitting = [name for name in plain if name.strip() == chosen[role]]
        else:
            fitting = [name for name, form in plain.items() if form == role]
            fitting = fitting or [name for name, form in plain.items() if form in others]
        if len(fitting) > 1:
            raise ValueError(
                f"columns {' and '.join(map(repr, fitting))} may both be the {role}; say which with"
                f" --{role}-column"
            )
        if fitting:
            found[role] = fitting[0]
        elif role != "split" or role in chosen:
            raise ValueError(
                f"no column {chosen.get(role, role)} in its head line {list(written)}; name it with"
                f" --{role}-column"
            )
    return found


def main(argv: Sequence[str] | None = None, *, prog: str = "csv_manifest.py") -> int:
    """Run the command line, and return its exit status; `prog` is what its help calls it."""
    parser = argparse.ArgumentParser(
        prog=prog, description="Convert a list of pictures into WebDataset tars."
    )
    parser.add_argument("manifest", help="CSV file with columns path, label and perhaps split")
    parser.add_argument("images", help="folder that paths start from, or a tar")
    parser.add_argument("out", help="folder to write; one subfolder for each split")
    for role in _COLUMNS:
        parser.add_argument(f"--{role}-column", metavar="NAME", help=f"the list's name of the {role} column")
    add_options(parser)
    return run_converter(_convert, parser, argv)


def _convert(**values: Any) -> list[Conversion]:
    chosen = {role: values.pop(f"{role}_column") for role in _COLUMNS}
    return convert_csv(**values, columns={role: name for role, name in chosen.items() if name is not None})


if __name__ == "__main__":
    sys.exit(main())
