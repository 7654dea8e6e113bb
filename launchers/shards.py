"""`data.train` that is a plain folder of pictures: what it is taken for, and its conversion before a start.

    SRC/train/CLASS/*.jpg, SRC/test/CLASS/*.jpg  ->  PLACE/NAME/train, PLACE/NAME/test
    SRC/CLASS/*.jpg                              ->  PLACE/NAME/train
    SRC/**/*.jpg                                 ->  PLACE/NAME/train, without labels, where none are needed

PLACE is the site's data root, where this user may write to it, else run.dir/shards. The run itself is told
the tars' folders, so a restart on another node asks nothing of this file. The conversion is a process of its
own.
"""

import hashlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from selfmask_dist.common.pictures import EXTENSIONS
from selfmask_dist.common.text import some
from selfmask_dist.config import Config
from selfmask_dist.config.site import Site, data_root

_MOST_ENTRIES = 20_000  # of a folder that are looked at for a picture
_MOST_WORKERS = 8  # a login node is shared
_SPLITS = {"train": ("train", "training"), "test": ("test", "testing")}


@dataclass(frozen=True)
class PictureFolder:
    """A folder that is converted into `out/split`. layout: as of `selfmask data convert folder`."""

    src: Path
    out: Path
    split: str
    layout: str

    @property
    def target(self) -> Path:
        """The folder of tars."""
        return self.out / self.split

    @property
    def as_override(self) -> str:
        """What the run is told in place of the folder of pictures."""
        return f"data.{self.split}={json.dumps(str(self.target))}"

    def __str__(self) -> str:
        what = "without labels" if self.layout == "unlabelled" else "its folders are classes"
        return f"data.{self.split}: {self.src} is a folder of pictures ({what}), converted into {self.target}"


def picture_folders(config: Config, site: Site) -> list[PictureFolder]:
    """Return what has to become tars before the run can start; nothing where data are tars already."""
    train, test = config.data.train, config.data.test
    found = []
    is_whole = config.data.held_out is None
    if train is not None and is_picture_folder(train):
        src, has_test = Path(train), _split_folder(Path(train), "test") is not None
        # its test folder is measured on where nothing else is said
        takes_test = has_test and is_whole and test is None
        layout = _layout(config, src, takes_test or test is not None or not is_whole)
        if layout == "unlabelled":  # and never the pictures of a split that is called otherwise
            src = _split_folder(src, "train") or src
        found.append(PictureFolder(src, _place(config, site, src), "train", layout))
        if takes_test and layout == "auto":
            found.append(PictureFolder(src, _place(config, site, src), "test", layout))
    if test is not None and is_picture_folder(test):
        src = Path(test)
        layout = _layout(config, src, True)
        if layout == "unlabelled":
            src = _split_folder(src, "test") or src
        found.append(PictureFolder(src, _place(config, site, src), "test", layout))
    return found


def is_picture_folder(text: str) -> bool:
    """Return whether a value of `data.train` is a folder with pictures and without tars, at some depth."""
    folder = Path(text)
    if "://" in text or not folder.is_dir() or any(folder.glob("*.tar")):
        return False
    files = (name for _, _, names in os.walk(folder, followlinks=True) for name in names)
    endings = (name.rpartition(".")[2].lower() for name in itertools.islice(files, _MOST_ENTRIES))
    return any(ending in EXTENSIONS for ending in endings)


def convert(folder: PictureFolder) -> None:
    """Convert a folder, or find what an earlier launch made of it. Shows a bar, and names what is left out.

    Raises:
        ValueError: it cannot be converted, or has changed since; the converter has said why.
    """
    print(folder, file=sys.stderr, flush=True)
    is_done = (folder.target / "dataset.json").exists()
    command = [sys.executable, "-m", "selfmask_dist.cli", "data", "convert", "folder"]
    command += [str(folder.src), str(folder.out), "--once", "--skip-broken"]
    command += [f"--split={folder.split}", f"--layout={folder.layout}", f"--num-workers={_num_workers()}"]
    if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
        raise ValueError(f"data.{folder.split}: {folder.src} was not converted, and nothing was started")
    rejects = folder.target / "rejects.jsonl"
    if rejects.exists() and not is_done:
        names = [str(json.loads(line)["path"]) for line in rejects.read_text().splitlines()]
        print(f"  left out, as {rejects} says: {some(names)}", file=sys.stderr)


def _layout(config: Config, src: Path, measures_labels: bool) -> str:
    """Return what the folders in `src` are: classes, where labels are needed or are there to be measured."""
    if config.needs_labels:
        return "auto"  # the converter refuses what is no tree of classes, and says the way out
    return "auto" if measures_labels and _looks_like_classes(src) else "unlabelled"


def _looks_like_classes(src: Path) -> bool:
    """Return whether a folder, or its train or test folder, holds two folders or more and no pictures."""
    inside = next((one for split in _SPLITS if (one := _split_folder(src, split)) is not None), src)
    folders, files = _entries(inside)
    has_pictures = any(path.suffix.lower().removeprefix(".") in EXTENSIONS for path in files)
    return len(folders) > 1 and not has_pictures and not any(_entries(path)[0] for path in folders)


def _split_folder(src: Path, split: str) -> Path | None:
    return next((path for path in _entries(src)[0] if path.name.lower() in _SPLITS[split]), None)


def _entries(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the folders and the files in a folder, hidden ones aside, by name."""
    shown: Iterator[Path] = (path for path in folder.iterdir() if not path.name.startswith("."))
    paths = sorted(shown)
    return [path for path in paths if path.is_dir()], [path for path in paths if not path.is_dir()]


def _place(config: Config, site: Site, src: Path) -> Path:
    """Return where a folder's tars go: the same for every run, as long as the folder is where it is."""
    root = data_root(site)
    is_writable = root is not None and os.access(root, os.W_OK | os.X_OK)
    place = root if root is not None and is_writable else Path(config.run.dir).absolute() / "shards"
    whole = src.resolve()
    # the folder's own name is for people; two folders of one name are told apart by their paths
    return place / f"{whole.name}-{hashlib.sha256(os.fsencode(whole)).hexdigest()[:8]}"


def _num_workers() -> int:
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(available, _MOST_WORKERS)
