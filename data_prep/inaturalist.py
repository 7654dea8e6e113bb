"""iNaturalist 2017, 2018, 2021 and subsets -> WebDataset tars.

    python data_prep/inaturalist.py IMAGES OUT --train train.json --val val.json

Reads COCO-style JSON: `images` (id, file_name), `annotations` (image_id, category_id) and `categories` (id,
name). IMAGES is the folder that `file_name` starts from, or the published tar.gz, read once as a stream. A
class is a category, called `00042_name`: 2018's categories have numbers for names. Knows nothing of torch or
training.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.command import add_options, run_converter
from data_prep.shards import Conversion
from data_prep.tables import Listed, convert_lists


def convert_inaturalist(
    images: str | Path,
    out: str | Path,
    *,
    train: str | Path | None = None,
    val: str | Path | None = None,
    test: str | Path | None = None,
    max_classes: int | None = None,
    max_samples_per_shard: int = 5000,
    short_side: int | None = None,
    quality: int = 90,
    skip_broken: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    num_workers: int = 1,
) -> list[Conversion]:
    """Convert the splits whose JSON is given. All are numbered by the categories of the first one.

    max_classes: keep that many categories, evenly spaced by id: a subset such as iNat500.
    Raises ValueError naming the JSON and what is wrong in it, and what `tables.convert_lists` raises.
    """
    paths = {
        name: path for name, path in (("train", train), ("val", val), ("test", test)) if path is not None
    }
    if not paths:
        raise ValueError("give at least one of --train, --val, --test")
    contents = {split: _read(Path(path)) for split, path in paths.items()}
    categories = {
        int(entry["id"]): f"{int(entry['id']):05d}_{str(entry['name']).replace('/', '-')}"
        for entry in next(iter(contents.values()))["categories"]
    }
    chosen = sorted(categories)
    if max_classes is not None and max_classes < len(chosen):
        chosen = [chosen[i * len(chosen) // max_classes] for i in range(max_classes)]
    kept = {number: categories[number] for number in chosen}
    return convert_lists(
        images,
        {split: _listed(paths[split], values, categories, kept) for split, values in contents.items()},
        out,
        classes=kept.values(),
        overwrite=overwrite,
        progress=progress,
        num_workers=num_workers,
        max_samples_per_shard=max_samples_per_shard,
        short_side=short_side,
        quality=quality,
        skip_broken=skip_broken,
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable JSON file ({error})") from error
    lacking = [
        name
        for name in ("images", "annotations", "categories")
        if not isinstance(values, dict) or name not in values
    ]
    if lacking:
        raise ValueError(f"{path}: lacks {', '.join(lacking)}; the published test sets have no labels")
    return values


def _listed(
    path: str | Path, values: dict[str, Any], categories: dict[int, str], kept: dict[int, str]
) -> Listed:
    category_of: dict[int, int] = {}
    for entry in values["annotations"]:
        image, category = entry["image_id"], int(entry["category_id"])
        if category not in categories:
            raise ValueError(f"{path}: image {image} is of category {category}, which is not listed")
        if category_of.setdefault(image, category) != category:
            raise ValueError(f"{path}: image {image} has two categories, {category_of[image]} and {category}")
    listed = []
    for entry in values["images"]:
        if entry["id"] not in category_of:
            raise ValueError(f"{path}: image {entry['id']} ({entry['file_name']}) has no annotation")
        category = category_of[entry["id"]]
        if category in kept:
            listed.append((str(entry["file_name"]), kept[category]))
    return listed


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="inaturalist.py", description="Convert iNaturalist into WebDataset tars."
    )
    parser.add_argument("images", help="folder of the JSON's file names, or the published tar.gz")
    parser.add_argument("out", help="folder to write; one subfolder for each split")
    for split in ("train", "val", "test"):
        parser.add_argument(f"--{split}", metavar="JSON", help=f"annotations of the {split} split")
    parser.add_argument("--max-classes", type=int, metavar="N", help="keep N categories, evenly spaced by id")
    add_options(parser)
    return run_converter(convert_inaturalist, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
