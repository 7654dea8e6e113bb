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
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

if not __package__:  # started by its path: Python put this file's folder on the path, not the one above it
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    __package__ = "data_prep"

from .command import add_options, run_converter
from .options import ConversionOptions, OptionValues
from .shards import Conversion, check_target, publish, write_split
from .split_names import settle_classes
from .writer import Picture, Read


def convert_torchvision(
    name: str,
    root: str | Path,
    out: str | Path,
    *,
    splits: Sequence[str] = ("train", "test"),
    download: bool = False,
    **options: Unpack[OptionValues],
) -> list[Conversion]:
    """Convert the named splits of `torchvision.datasets.NAME`; data sets with `train=` have train and test,
    and one without splits is all "train".

    splits: `train=trainval` writes the split that torchvision calls trainval to `out/train`.
    A label below 0, as STL-10's unlabelled split has it, is none.
    Raises ValueError for a data set or split that does not exist, or is not there, and for a label that is no
    class number.
    """
    chosen = ConversionOptions(**options)
    own = {target: given or target for target, _, given in (split.partition("=") for split in splits)}
    for split in own:
        check_target(Path(out) / split, chosen.overwrite)
    datasets = {split: _open(name, root, given, download) for split, given in own.items()}
    first = next(iter(own))
    labels = {split: _numbers(split, dataset) for split, dataset in datasets.items()}
    named = {split: _classes(dataset, labels.values()) for split, dataset in datasets.items()}
    done = []
    for split, dataset in datasets.items():
        class_of, notes = settle_classes((), chosen.similar_classes, order=named[split])
        classes = tuple(dict.fromkeys(class_of[one] for one in named[split]))
        if named[split] != named[first]:
            notes.append(f"its classes are not those of {first}: the splits are numbered on their own")
        outside = sorted({label for label in labels[split] if label >= len(named[split])})
        if outside:
            raise ValueError(
                f"{name}, split {split}: label {outside[0]}, and there are only {len(named[split])} classes"
            )
        width = len(str(len(labels[split])))
        pictures = [
            Picture(
                None,
                f"{index:0{width}d}",
                f"{index:0{width}d}",
                class_of[named[split][label]] if label >= 0 else None,
            )
            for index, label in enumerate(labels[split])
        ]
        read = _EncodedPictures(dataset)
        one = write_split(Path(out) / split, classes, pictures, [], chosen, read=read)
        done.append(replace(one, notes=(*notes, *one.notes)))
    return publish(done)


class _EncodedPictures:
    """Gives the encoded bytes of the i-th picture, or says why there are none."""

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

    def __call__(self, picture: Picture) -> Read:
        index = int(picture.name)
        try:
            if self.files is not None:
                file = self.files[index]
                path = Path(file[0] if isinstance(file, tuple) else file)
                if path.exists() and not path.is_file():
                    return "is a pipe, a socket or a device, and no file"
                return path.read_bytes()
            buffer = io.BytesIO()
            self.dataset[index][0].save(buffer, "PNG")
        except (OSError, ValueError) as error:
            return f"cannot be read ({error})"
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
    elif split != "train" or "version" in parameters or "annotation_path" in parameters:
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


def _numbers(split: str, dataset: Any) -> list[int]:
    """Return the labels as numbers. Raises ValueError where they are none."""
    try:
        return [int(label) for label in _labels(dataset)]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"split {split}: its labels are no class numbers ({error}); convert a folder or a list instead"
        ) from error


def _classes(dataset: Any, labels: Iterable[Sequence[int]]) -> tuple[str, ...]:
    """Return the data set's own names, else the numbers up to the largest label of any split."""
    most = max((max(part, default=-1) for part in labels), default=-1)
    names = getattr(dataset, "classes", None) or [str(number) for number in range(most + 1)]
    if len(set(names)) != len(names):
        raise ValueError("a class name appears twice in it; convert a folder or a list instead")
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
