"""The settings that a subject is evaluated with: its run's, or the defaults, and what is given over them."""

from collections.abc import Sequence
from pathlib import Path

from selfmask_dist import maskfile
from selfmask_dist.cli.eval.views import SPLITS
from selfmask_dist.common import names
from selfmask_dist.config import Config, load_config


def read_config(path: Path, given: str | None, overrides: Sequence[str], *, data: str | None) -> Config:
    """Return the settings for a subject: --config, else the config.yaml of its run, else the defaults with
    the backbone that the mask file names; then --data, then key=value.
    """
    changes = [] if data is None else ["data.subset=null", *_splits_in(Path(data))]
    changes += overrides
    beside = (path if path.is_dir() else path.parent) / names.CONFIG
    if given is None and beside.exists():
        given = str(beside)
    elif given is None and path.is_file():
        name = maskfile.read_backbone_name(path)
        if name and not any(change.startswith("backbone.name=") for change in changes):
            changes.insert(0, f"backbone.name={name}")
    return load_config(given, changes)


def _splits_in(folder: Path) -> list[str]:
    """Settings for the train and test data in a folder."""
    settings = []
    for split in SPLITS:
        found = [place for place in (folder / split, folder / f"{split}.tar") if place.exists()]
        if not found:
            raise ValueError(f"--data {folder} holds no {split} folder and no {split}.tar")
        settings.append(f"data.{split}={found[0]}")
    return settings
