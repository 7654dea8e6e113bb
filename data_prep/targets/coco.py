"""COCO's JSON -> WebDataset tars with several labels a picture.

    python data_prep/targets/coco.py ANNOTATIONS.json IMAGES OUT

A picture is of every category that it has an annotation of, and of none where it has no annotation. Classes
are the file's categories by their ids, so that the files of two splits number them alike.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

if not __package__:  # started by its path: Python put this file's folder on the path, not the ones above it
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    __package__ = "data_prep.targets"

from selfmask_dist.common.text import some

from ..command import add_options, run_converter
from ..options import ConversionOptions, OptionValues
from ..shards import Conversion
from ..split_names import resembles_split
from .rows import Row, write_rows


def convert_coco(
    annotations: str | Path,
    images: str | Path,
    out: str | Path,
    *,
    split: str | None = None,
    **options: Unpack[OptionValues],
) -> list[Conversion]:
    """Convert one file of annotations into OUT/SPLIT.

    split: train by default, or what the file's name says (instances_val2017.json).
    Raises ValueError naming what is wrong: no such JSON, an annotation of an unknown image or category.
    """
    path = Path(annotations)
    names, rows = _read(path)
    place = split or resembles_split(path.stem) or "train"
    return write_rows(Path(images), {place: rows}, Path(out), names, ConversionOptions(**options))


def _read(path: Path) -> tuple[list[str], list[Row]]:
    """Return the categories' names in the order of their ids, and a row for each image."""
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        images = {int(image["id"]): str(image["file_name"]) for image in content["images"]}
        categories = {int(one["id"]): str(one["name"]) for one in content["categories"]}
        pairs = [(int(one["image_id"]), int(one["category_id"])) for one in content["annotations"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no file of COCO's form, a JSON object with images (id, file_name), categories (id, "
            f"name) and annotations (image_id, category_id): {type(error).__name__}: {error}"
        ) from error
    if not images or not categories:
        raise ValueError(f"{path} lists {len(images)} images and {len(categories)} categories")
    if twice := [name for name, count in Counter(categories.values()).items() if count > 1]:
        raise ValueError(f"{path}: categories have the same name ({some(twice)}); rename one of each")
    if unknown := sorted({category for _, category in pairs} - categories.keys()):
        told = some([str(one) for one in unknown])
        raise ValueError(f"{path}: annotations are of categories that it does not list: {told}")
    if lost := sorted({image for image, _ in pairs} - images.keys()):
        told = some([str(one) for one in lost])
        raise ValueError(f"{path}: annotations are of images that it does not list: {told}")
    number = {category: n for n, category in enumerate(sorted(categories))}
    labels: dict[int, set[int]] = {image: set() for image in images}
    for image, category in pairs:
        labels[image].add(number[category])
    rows = [Row(name, {"labels": sorted(labels[image])}) for image, name in images.items()]
    return [categories[category] for category in sorted(categories)], rows


def main(argv: Sequence[str] | None = None, *, prog: str = "coco.py") -> int:
    """Run the command line, and return its exit status; `prog` is what its help calls it."""
    parser = argparse.ArgumentParser(
        prog=prog, description="Convert COCO's JSON into WebDataset tars with several labels a picture."
    )
    parser.add_argument("annotations", help="JSON with images, annotations and categories")
    parser.add_argument("images", help="folder that file_name starts from")
    parser.add_argument("out", help="folder to write; one subfolder for the split")
    parser.add_argument("--split", help="the subfolder's name (by the file's name, else train)")
    add_options(parser)
    return run_converter(convert_coco, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
