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

from data_prep.command import add_options, run_converter
from data_prep.shards import Conversion
from data_prep.tables import Listed, convert_lists


def convert_csv(
    manifest: str | Path,
    images: str | Path,
    out: str | Path,
    *,
    max_samples_per_shard: int = 5000,
    short_side: int | None = None,
    quality: int = 90,
    skip_broken: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    num_workers: int = 1,
) -> list[Conversion]:
    """Convert every split that the list names ("train" where it names none), under one list of classes.

    Raises ValueError naming the line: a column that is absent, an empty field.
    """
    path = Path(manifest)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    splits: dict[str, Listed] = {}
    with open(path, newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        lacking = [name for name in ("path", "label") if name not in (rows.fieldnames or [])]
        if lacking:
            raise ValueError(f"{path}: no column {' and '.join(lacking)} in its head line {rows.fieldnames}")
        for row in rows:
            name, label, split = row["path"], row["label"], row.get("split", "train")
            if not name or not label or not split or "/" in split:
                raise ValueError(f"{path}, line {rows.line_num}: a field is empty or no name")
            splits.setdefault(split, []).append((name, label))
    if not splits:
        raise ValueError(f"{path}: lists no pictures")
    return convert_lists(
        images,
        splits,
        out,
        overwrite=overwrite,
        progress=progress,
        num_workers=num_workers,
        max_samples_per_shard=max_samples_per_shard,
        short_side=short_side,
        quality=quality,
        skip_broken=skip_broken,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="csv_manifest.py", description="Convert a list of pictures into WebDataset tars."
    )
    parser.add_argument("manifest", help="CSV file with columns path, label and perhaps split")
    parser.add_argument("images", help="folder that paths start from, or a tar")
    parser.add_argument("out", help="folder to write; one subfolder for each split")
    add_options(parser)
    return run_converter(convert_csv, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
