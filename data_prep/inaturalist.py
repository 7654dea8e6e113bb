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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Unpack

if not __package__:  # started by its path: Python put this file's folder on the path, not the one above it
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    __package__ = "data_prep"

from selfmask_dist.common.class_names import normal_name
from selfmask_dist.common.text import some

from .command import add_options, run_converter
from .options import ConversionOptions, OptionValues
from .shards import Conversion
from .tables import Listed, convert_lists


def convert_inaturalist(
    images: str | Path,
    out: str | Path,
    *,
    train: str | Path | None = None,
    val: str | Path | None = None,
    test: str | Path | None = None,
    max_classes: int | None = None,
    **options: Unpack[OptionValues],
) -> list[Conversion]:
    """Convert the splits whose JSON is given; the categories of the first one number all of them.

    max_classes: keep that many categories, evenly spaced by id: a subset such as iNat500.
    Raises ValueError naming the JSON and what is wrong in it, and what `tables.convert_lists` raises.
    """
    paths = {
        name: path for name, path in (("train", train), ("val", val), ("test", test)) if path is not None
    }
    if not paths:
        raise ValueError("give at least one of --train, --val, --test")
    contents = {split: _read(Path(path)) for split, path in paths.items()}
    numbered = {split: _categories(paths[split], values) for split, values in contents.items()}
    first, categories = next(iter(numbered.items()))
    for split, others in numbered.items():
        renamed = [name for number, name in others.items() if categories.get(number, name) != name]
        if renamed:
            raise ValueError(f"{paths[split]}: its categories are not those of {first} ({some(renamed)})")
    chosen = sorted(categories)
    if max_classes is not None and max_classes < 1:
        raise ValueError(f"max classes is {max_classes}; it must be at least 1")
    if max_classes is not None and max_classes < len(chosen):
        chosen = [chosen[i * len(chosen) // max_classes] for i in range(max_classes)]
    kept = {number: categories[number] for number in chosen}
    return convert_lists(
        images,
        {split: _listed(paths[split], values, categories, kept) for split, values in contents.items()},
        out,
        classes=kept.values(),
        options=ConversionOptions(**options),
        notes={split: _left_out(paths[split], values) for split, values in contents.items()},
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
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


def _entries(path: str | Path, values: dict[str, Any], part: str, **fields: type) -> Iterator[Any]:
    """Yield the fields of each entry of a part, as the types that are asked for."""
    entries = values[part] if isinstance(values[part], list) else [values[part]]
    for place, entry in enumerate(entries):
        try:
            found = tuple(entry[name] for name in fields)
            if None in found:
                raise TypeError("null")
            yield tuple(kind(value) for kind, value in zip(fields.values(), found, strict=True))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: entry {place} of {part} needs {' and '.join(fields)} ({error!r}); is it the"
                " published file?"
            ) from error


def _categories(path: str | Path, values: dict[str, Any]) -> dict[int, str]:
    """Return the class name of each category's number."""
    categories: dict[int, str] = {}
    for number, name in _entries(path, values, "categories", id=int, name=str):
        class_name = f"{number:05d}_{normal_name(name).replace('/', '-')}"
        if categories.setdefault(number, class_name) != class_name:
            raise ValueError(
                f"{path}: category {number} has two names, {categories[number]} and {class_name}; keep one"
            )
    return categories


def _listed(
    path: str | Path, values: dict[str, Any], categories: dict[int, str], kept: dict[int, str]
) -> Listed:
    category_of: dict[str, int] = {}
    for image, category in _entries(path, values, "annotations", image_id=str, category_id=int):
        if category not in categories:
            raise ValueError(f"{path}: image {image} is of category {category}, which is not listed")
        if category_of.setdefault(image, category) != category:
            raise ValueError(f"{path}: image {image} has two categories, {category_of[image]} and {category}")
    listed: Listed = []
    for image, file_name in _entries(path, values, "images", id=str, file_name=str):
        if image not in category_of:
            raise ValueError(f"{path}: image {image} ({file_name}) has no annotation")
        if category_of[image] in kept:
            listed.append((file_name, kept[category_of[image]]))
    return listed


def _left_out(path: str | Path, values: dict[str, Any]) -> list[str]:
    """Return a note on annotations whose picture is not listed."""
    known = {image for (image,) in _entries(path, values, "images", id=str)}
    annotated = [image for (image,) in _entries(path, values, "annotations", image_id=str)]
    foreign = [image for image in annotated if image not in known]
    if not foreign:
        return []
    return [f"{len(foreign)} annotations are of images that are not listed ({some(foreign)})"]


def main(argv: Sequence[str] | None = None, *, prog: str = "inaturalist.py") -> int:
    """Run the command line, and return its exit status; `prog` is what its help calls it."""
    parser = argparse.ArgumentParser(prog=prog, description="Convert iNaturalist into WebDataset tars.")
    parser.add_argument("images", help="folder of the JSON's file names, or the published tar.gz")
    parser.add_argument("out", help="folder to write; one subfolder for each split")
    for split in ("train", "val", "test"):
        parser.add_argument(f"--{split}", metavar="JSON", help=f"annotations of the {split} split")
    parser.add_argument("--max-classes", type=int, metavar="N", help="keep N categories, evenly spaced by id")
    add_options(parser)
    return run_converter(convert_inaturalist, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
