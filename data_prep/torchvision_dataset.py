"""A torchvision data set -> WebDataset tars.

    python data_prep/torchvision_dataset.py Flowers102 ROOT OUT --splits train val test

Data sets that read files (Flowers102, DTD, EuroSAT, ...) keep their bytes; those that hold arrays (CIFAR10,
...) become PNGs, which lose nothing. Labels and class names are the data set's own. Nothing is downloaded
unless --download is given. torchvision is imported when it is needed.
"""

from __future__ import annotations

import argparse
import inspect
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

if not __package__:  # started by its path: Python put this file's folder on the path, not the one above it
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    __package__ = "data_prep"

from .command import add_options, run_converter
from .options import ConversionOptions, OptionValues
from .shards import Conversion, check_target, publish, write_split
from .writer import Picture


def convert_torchvision(
    name: str,
    root: str | Path,
    out: str | Path,
    *,
    splits: Sequence[str] = ("train", "test"),
    download: bool = False,
    **options: Unpack[OptionValues],
) -> list[Conversion]:
    """Convert the named splits of `torchvision.datasets.NAME`; data sets with `train=` have train and test.

    Raises ValueError for a data set or split that does not exist, or is not there.
    """
    chosen = ConversionOptions(**options)
    done = []
    for split in splits:
        target = Path(out) / split
        check_target(target, chosen.overwrite)
        dataset = _open(name, root, split, download)
        labels = [int(label) for label in _labels(dataset)]
        classes = _classes(dataset, labels)
        width = len(str(len(labels)))
        pictures = [
            Picture(None, f"{index:0{width}d}", f"{index:0{width}d}", classes[label])
            for index, label in enumerate(labels)
        ]
        done.append(write_split(target, classes, pictures, [], chosen, read=_EncodedPictures(dataset)))
    return publish(done)


class _EncodedPictures:
    """Reads a picture of the data set as encoded bytes; a picture's name is its number."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.files = next(
            (
                getattr(dataset, attribute)
                for attribute in ("_image_files", "_images", "_samples", "samples")
                if hasattr(dataset, attribute)
            ),
            None,
        )

    def __call__(self, picture: Picture) -> bytes:
        index = int(picture.name)
        if self.files is not None:
            file = self.files[index]
            return Path(file[0] if isinstance(file, tuple) else file).read_bytes()
        buffer = io.BytesIO()
        self.dataset[index][0].save(buffer, "PNG")
        return buffer.getvalue()


def _open(name: str, root: str | Path, split: str, download: bool) -> Any:
    from torchvision import datasets  # type: ignore[import-untyped]

    cls = getattr(datasets, name, None)
    if cls is None:
        raise ValueError(f"torchvision has no data set {name!r}")
    parameters = inspect.signature(cls).parameters
    arguments: dict[str, Any] = {"download": download} if "download" in parameters else {}
    if "split" in parameters:
        arguments["split"] = split
    elif "train" in parameters and split in ("train", "test"):
        arguments["train"] = split == "train"
    else:
        raise ValueError(f"{name} has no split {split!r}")
    try:
        return cls(str(root), **arguments)
    except (RuntimeError, OSError, ValueError) as error:
        raise ValueError(f"{name}, split {split}: {error} (in {root}; --download fetches it)") from error


def _labels(dataset: Any) -> Sequence[int]:
    for attribute in ("targets", "labels", "_labels"):
        if hasattr(dataset, attribute):
            return getattr(dataset, attribute)
    return [dataset[index][1] for index in range(len(dataset))]


def _classes(dataset: Any, labels: Sequence[int]) -> tuple[str, ...]:
    names = getattr(dataset, "classes", None) or [str(number) for number in range(max(labels) + 1)]
    if len(set(names)) != len(names):
        raise ValueError("a class name appears twice in it; convert a folder or a CSV list instead")
    return tuple(map(str, names))


def main(argv: Sequence[str] | None = None, *, prog: str = "torchvision_dataset.py") -> int:
    """Run the command line, and return its exit status; `prog` is what its help calls it."""
    parser = argparse.ArgumentParser(
        prog=prog, description="Convert a torchvision data set into WebDataset tars."
    )
    parser.add_argument("name", help="class in torchvision.datasets, such as Flowers102")
    parser.add_argument("root", help="folder where it lies")
    parser.add_argument("out", help="folder to write; one subfolder for each split")
    parser.add_argument("--splits", nargs="+", default=["train", "test"], help="train test")
    parser.add_argument("--download", action="store_true", help="fetch it where it is absent")
    add_options(parser)
    return run_converter(convert_torchvision, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
