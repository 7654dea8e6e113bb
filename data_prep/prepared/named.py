"""The paper's data sets by name: `selfmask data get NAME` -> ROOT/NAME/{train,test}, indexed.

    ROOT/originals/NAME/   what is downloaded, or put there by hand     ROOT/NAME/SPLIT/   the tars

torchvision downloads and checks what it knows, `archives` what its publishers have; what cannot be downloaded
is put there by hand, and a message says which file goes where. Splits are the publishers'.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..command import describe
from ..image_folder import convert_image_folder
from ..inaturalist import convert_inaturalist
from ..options import OptionValues
from ..shards import Conversion
from ..sun397 import convert_sun397
from ..torchvision_dataset import convert_torchvision
from .archives import Archive, bring_archives
from .once import is_described, make_index

ORIGINALS = "originals"


@dataclass(frozen=True)
class NamedSet:
    """A data set. splits: of its tars. files: what has to lie in its folder of originals, for people; a
    download brings the same. note: what a user should know of its splits.
    """

    about: str
    splits: tuple[str, ...]
    files: tuple[str, ...]
    convert: Callable[[Path, Path, OptionValues], list[Conversion]]
    note: str = ""


def _torchvision(name: str, *splits: str) -> Callable[[Path, Path, OptionValues], list[Conversion]]:
    def convert(originals: Path, out: Path, options: OptionValues) -> list[Conversion]:
        return convert_torchvision(name, originals, out, splits=splits, download=True, **options)

    return convert


_SUN397 = (
    Archive("https://vision.princeton.edu/projects/2010/SUN/download/Partitions.zip", "Partitions"),
    # checksums are those of torchvision
    Archive(
        "http://vision.princeton.edu/projects/2010/SUN/SUN397.tar.gz",
        "SUN397",
        "8ca2778205c41d23104230ba66911c7a",
    ),
)
_INAT_PLACE = "https://ml-inat-competition-datasets.s3.amazonaws.com/2021/"
_INATURALIST = (
    Archive(f"{_INAT_PLACE}train.json.tar.gz", "train.json"),
    Archive(f"{_INAT_PLACE}val.json.tar.gz", "val.json"),
    Archive(f"{_INAT_PLACE}val.tar.gz", "val", "f6f6e0e242e3d4c9569ba56400938afc"),
    Archive(f"{_INAT_PLACE}train.tar.gz", "train", "e0526d53c7f7b2e3167b2b43bb2690ed"),
)


def _sun397(originals: Path, out: Path, options: OptionValues) -> list[Conversion]:
    bring_archives(_SUN397, originals)
    return convert_sun397(originals / "SUN397", out, lists=originals / "Partitions", **options)


def _frames(originals: Path, out: Path, options: OptionValues) -> list[Conversion]:
    return convert_image_folder(originals, out, layout="splits", **options)


def _inaturalist(max_classes: int | None) -> Callable[[Path, Path, OptionValues], list[Conversion]]:
    def convert(originals: Path, out: Path, options: OptionValues) -> list[Conversion]:
        bring_archives(_INATURALIST, originals)
        train, val = originals / "train.json", originals / "val.json"
        # the published test split has no labels: everybody measures on the validation split
        return convert_inaturalist(originals, out, train=train, test=val, max_classes=max_classes, **options)

    return convert


_INAT_FILES = (
    "train.json.tar.gz and val.json.tar.gz, or train.json and val.json of them",
    "train.tar.gz (224 GB) and val.tar.gz (8 GB), or train/ and val/ of them",
    "all from https://github.com/visipedia/inat_comp/tree/master/2021",
)
_BOTH = ("train", "test")
_THREE = ("train", "val", "test")
SETS = {
    "cifar10": NamedSet(
        "10 classes, 32 x 32 pixels",
        _BOTH,
        ("cifar-10-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html",),
        _torchvision("CIFAR10", *_BOTH),
    ),
    "cifar100": NamedSet(
        "100 classes, 32 x 32 pixels",
        _BOTH,
        ("cifar-100-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html",),
        _torchvision("CIFAR100", *_BOTH),
    ),
    "dtd": NamedSet(
        "47 textures, the first of ten partitions",
        _THREE,
        ("dtd/dtd-r1.0.1.tar.gz from https://www.robots.ox.ac.uk/~vgg/data/dtd/",),
        _torchvision("DTD", *_THREE),
    ),
    "eurosat": NamedSet(
        "10 kinds of land use from space",
        ("train",),
        ("eurosat/EuroSAT.zip from https://github.com/phelber/EuroSAT",),
        _torchvision("EuroSAT", "train"),
        note="EuroSAT is published without splits: measure with data.held_out=0.2 in place of data.test",
    ),
    "flowers102": NamedSet(
        "102 flowers",
        _THREE,
        (
            "flowers-102/102flowers.tgz, imagelabels.mat and setid.mat, all in flowers-102/, from "
            "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
        ),
        _torchvision("Flowers102", *_THREE),
    ),
    "pets": NamedSet(
        "37 breeds",
        _BOTH,
        (
            "oxford-iiit-pet/images.tar.gz and annotations.tar.gz, both in oxford-iiit-pet/, from "
            "https://www.robots.ox.ac.uk/~vgg/data/pets/",
        ),
        _torchvision("OxfordIIITPet", "train=trainval", "test"),
    ),
    "sun397": NamedSet(
        "397 scenes, the first of ten partitions",
        _BOTH,
        (
            "SUN397.tar.gz (39 GB), or SUN397/ of it",
            "Partitions.zip, or Partitions/ of it, with Training_01.txt and Testing_01.txt",
            "both from https://vision.princeton.edu/projects/2010/SUN/",
        ),
        _sun397,
    ),
    "ucf101": NamedSet(
        "101 actions, a frame of each video",
        _BOTH,
        (
            "train/CLASS/VIDEO.jpg and test/CLASS/VIDEO.jpg: the middle frame of each video of "
            "https://www.crcv.ucf.edu/data/UCF101.php, by the first of its three train/test lists",
        ),
        _frames,
    ),
    "inat500": NamedSet("500 of iNaturalist 2021's species", _BOTH, _INAT_FILES, _inaturalist(500)),
    "inat21": NamedSet("iNaturalist 2021, 10,000 species", _BOTH, _INAT_FILES, _inaturalist(None)),
}
_SHARED_ORIGINALS = {"inat500": "inat21"}


def get_named(name: str, root: str | Path, **options: object) -> list[Conversion]:
    """Return the splits of a data set in `root/name`, made and indexed where they are absent.

    Raises:
        ValueError: there is no set of this name, or its files are neither there nor can be downloaded; the
            message says which file goes where.
    """
    if name not in SETS:
        known_sets = "".join(
            f"\n    {one:11} {known.about} ({', '.join(known.splits)})" for one, known in SETS.items()
        )
        raise ValueError(f"no data set {name!r} to get; there are{known_sets}")
    chosen, out = SETS[name], Path(root) / name
    originals = Path(root) / ORIGINALS / _SHARED_ORIGINALS.get(name, name)
    found = [is_described(out / split) for split in chosen.splits]
    if not all(done is not None for done in found):
        originals.mkdir(parents=True, exist_ok=True)
        # over the splits of a call that was killed while it gave them their names
        values: OptionValues = {"overwrite": True, **options}  # type: ignore[typeddict-item]
        try:
            found = list(chosen.convert(originals, out, values))
        except (ValueError, OSError) as error:
            raise ValueError(
                f"{name}: {error}\n  what has to lie in {originals}, put there by hand where it cannot be "
                f"downloaded:\n" + "\n".join(f"    {file}" for file in chosen.files)
            ) from error
    done = [conversion for conversion in found if conversion is not None]
    for conversion in done:
        make_index(conversion.folder, has_labels=True)
    return done


def bring(name: str, root: Path | None, *, num_workers: int = 1) -> int:
    """Bring a data set into the data root, say where it is, and return the exit status of the command."""
    if root is None:
        print(
            "error: no data root is known; give --root DIR, or say it once: export SELFMASK_DATA=DIR, or in "
            "a site file (site: {data_root: DIR}; `selfmask site init` writes one)",
            file=sys.stderr,
        )
        return 2
    try:
        done = get_named(name, root, num_workers=num_workers)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    describe(done)
    if SETS[name].note:
        print(f"  note: {SETS[name].note}")
    measured = f" data.test={name}" if "test" in SETS[name].splits else ""
    print(f"  next: data.train={name}{measured}, with {os.path.abspath(root)} as the data root")
    return 0
