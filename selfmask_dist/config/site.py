"""A site file: what one cluster or laptop says once for all of its runs, below their own configuration.

    launch: {partition: gpu, account: vision}      any key of a configuration
    run: {dir: /scratch/me/runs}
    site:                                          and what is of the place alone
      data_root: /data/sets                        data.train=inat21 is /data/sets/inat21/train
      weights: {timm:resnet50.a1_in1k: /data/weights/resnet50.safetensors}

It is found in `--site FILE`, $SELFMASK_SITE, `site.yaml` of the working directory and
`~/.config/selfmask/site.yaml`, the first of them; `none` in the first two stands for no site file.
"""

import os
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from selfmask_dist.config import loading
from selfmask_dist.config.all_sections import AllSections
from selfmask_dist.config.fields import NonEmpty, Section, Strings, orchestration

VARIABLE, DATA_VARIABLE = "SELFMASK_SITE", "SELFMASK_DATA"
FILE = "site.yaml"
_NONE = "none"
_NAME = re.compile(r"[A-Za-z0-9][\w-]*")  # of a data set: no path, pattern or address


class SiteConfig(Section):
    """The section `site` of a site file. Paths may hold ~ and $VARIABLES."""

    data_root: NonEmpty | None = orchestration(
        None,
        "Folder of data sets: data.train=NAME is its NAME/train, and data.test=NAME its NAME/test. "
        "$SELFMASK_DATA is looked in first.",
    )
    data: dict[str, NonEmpty] = orchestration(
        {},
        "Data sets that lie elsewhere, by name: folders with train and test in them, of tars or of pictures.",
    )
    weights: dict[str, NonEmpty] = orchestration(
        {}, "Files of weights by backbone.name, for nodes without a network."
    )
    hub_cache: NonEmpty | None = orchestration(
        None, "Folder of downloaded models that all nodes see: HF_HOME of every process."
    )
    modules: Strings = orchestration((), "SLURM: environment modules that are loaded before processes start.")


class _SiteFile(BaseModel):
    site: SiteConfig = SiteConfig()


@dataclass(frozen=True)
class Site:
    """What a site file says; without a file, nothing.

    own: its section `site`. given: the other keys, which stand below a run's own.
    """

    path: Path | None = None
    own: SiteConfig = field(default_factory=SiteConfig)
    given: loading.Given = field(default_factory=loading.Given)


def find_site(given: str | None = None) -> Site:
    """Return the site that `--site`, the environment, the working directory or the home folder names.

    Raises:
        ConfigError: the file that is named is not there, or wrong.
    """
    asked = given or os.environ.get(VARIABLE)
    if asked is not None:
        return Site() if asked == _NONE else read_site(Path(asked).absolute())
    for path in (Path(FILE), config_home()):
        if path.is_file():
            return read_site(path.absolute())
    return Site()


def config_home() -> Path:
    """Return where a user's site file is."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "selfmask" / FILE


def read_site(path: Path) -> Site:
    """Return what a site file says. Raises ConfigError with every problem of its section `site`."""
    given = loading.read(path)
    inside = {at: source for at, source in given.sources.items() if at[:1] == ("site",)}
    values = dict(given.values)
    part = {"site": values.pop("site")} if values.get("site") is not None else {}
    values.pop("site", None)
    own = loading.load_given(_SiteFile, loading.Given(part, {(): given.sources[()], **inside})).site
    sources = {at: source for at, source in given.sources.items() if at not in inside}
    return Site(path, own, loading.Given(values, sources))


def complete(config: AllSections, site: Site, said: Collection[str]) -> dict[str, dict[str, Any]]:
    """Return what a site adds to a configuration that is valid already, by section.

    Args:
        said: the dotted keys that were given; the others have their defaults.
    """
    data = {
        split: folder
        for split in ("train", "test")
        if (folder := _data_folder(getattr(config.data, split), split, site)) is not None
    }
    found: dict[str, dict[str, Any]] = {"data": data}
    weights = site.own.weights.get(config.backbone.name)
    if weights is not None and config.backbone.pretrained and "backbone.weights" not in said:
        found["backbone"] = {"weights": _expanded(weights)}
    launch: dict[str, Any] = {}
    if site.own.hub_cache is not None and "HF_HOME" not in config.launch.environment:
        launch["environment"] = {**config.launch.environment, "HF_HOME": _expanded(site.own.hub_cache)}
    if site.own.modules:
        line = f"module load {' '.join(site.own.modules)}"
        if line not in config.launch.setup:  # the configuration of a run has it already
            launch["setup"] = (line, *config.launch.setup)
    return {section: values for section, values in {**found, "launch": launch}.items() if values}


def _data_folder(name: str | None, split: str, site: Site) -> str | None:
    """Return the folder that the name of a data set stands for; None where it is a path, or not found."""
    if name is None or not _NAME.fullmatch(name) or Path(name).exists():
        return None
    if name in site.own.data:
        folder = Path(_expanded(site.own.data[name]))
        inside = folder / split
        # one that holds no splits is trained on whole: its tars, or the pictures that a launch converts
        is_whole = not inside.exists() and folder.is_dir() and (split == "train" or any(folder.glob("*.tar")))
        return str(folder if is_whole else inside)
    roots = [os.environ.get(DATA_VARIABLE), site.own.data_root]
    for root in (_expanded(root) for root in roots if root):
        if (Path(root) / name).is_dir():
            return str(Path(root) / name / split)
    return None


def data_root(site: Site) -> Path | None:
    """Return the folder that data sets are put into: $SELFMASK_DATA, else the site's; None without either."""
    found = os.environ.get(DATA_VARIABLE) or site.own.data_root
    return Path(_expanded(found)) if found else None


def is_data_name(text: str) -> bool:
    """Return whether a value of `data.train` can only be the name of a data set that was not found."""
    return _NAME.fullmatch(text) is not None and not Path(text).exists()


def _expanded(path: str) -> str:
    return os.path.expanduser(os.path.expandvars(path))
