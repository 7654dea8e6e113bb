"""Mask files by name: pushed to a hub with a model card, and pulled from there, checked before they are read.

    push_to_hub("runs/pets", "me/pets")            Hugging Face's hub
    push_to_hub("runs/pets", "me/pets", hub="/shared/hub")      a folder that serves as one

A repository holds `model.mask`, `README.md`, perhaps `sparsity.png`, and `manifest.json`, which states size
and SHA-256 of the others. Nothing else is fetched, and nothing in it is executed: a repository that holds a
pickle or a program is refused as a whole.
"""

import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from selfmask_dist.common import names
from selfmask_dist.common.files import sha256, write_json, write_text
from selfmask_dist.maskfile import MaskFile, MaskFileError, read_mask_file
from selfmask_dist.maskfile.file import read_about
from selfmask_dist.maskfile.mask import WithoutWeightsError
from selfmask_dist.models.card import draw_if_possible, write_card
from selfmask_dist.models.folder_hub import FolderHub
from selfmask_dist.models.huggingface import HuggingFaceHub
from selfmask_dist.models.repository import (
    CARD,
    FORMAT,
    HUB_MASK,
    MANIFEST,
    PICTURE,
    HubError,
    check_file,
    check_name,
    read_manifest,
)

HUB_VARIABLE = "SELFMASK_HUB"  # where names are looked up, unless `hub=` says


class Hub(Protocol):
    """Where repositories are."""

    def push(self, repo: str, folder: Path, *, message: str, private: bool) -> str:
        """Make a repository of the files of a folder, in place of an earlier one; return where it is."""

    def fetch(self, repo: str, wanted: Iterable[str], out: Path) -> None:
        """Bring those of the wanted files that there are into a folder, as plain files, unchecked.

        Raises:
            HubError: there is no such repository, or it holds what is not to be read.
        """

    def repositories(self, owner: str | None) -> list[str]:
        """Return the names of the repositories with masks."""


def open_hub(hub: str | Path | None = None) -> Hub:
    """Return a hub.

    Args:
        hub: a folder (a path, or file://...), or the address of a server that speaks Hugging Face's protocol;
            None: what the variable SELFMASK_HUB says, and without it Hugging Face's own hub.
    """
    where = str(hub or os.environ.get(HUB_VARIABLE) or "")
    if where.startswith(("http://", "https://")) or not where:
        return HuggingFaceHub(where or None)
    return FolderHub(Path(where.removeprefix("file://")))


def push_to_hub(
    source: str | Path,
    repo: str,
    *,
    hub: str | Path | None = None,
    private: bool = False,
    message: str = "A mask of selfmask_dist",
) -> str:
    """Push the mask of a run's folder, or a mask file, with a model card; return where it is.

    Args:
        repo: `owner/name`.
        hub: see `open_hub`.
        private: a repository that only its owner sees, where the hub has such.

    Raises:
        HubError: `repo` is no such name.
        MaskFileError: the source holds no mask file, or a damaged one.
    """
    check_name(repo)
    path = _mask_of(Path(source))
    file = _read(path)
    with tempfile.TemporaryDirectory() as folder:
        staged = Path(folder)
        shutil.copyfile(path, staged / HUB_MASK)
        has_picture = draw_if_possible(file, staged / PICTURE, title=repo)
        about = read_about(path) if not file.masks else file
        write_text(
            staged / CARD,
            write_card(about, repo, num_bytes=path.stat().st_size, picture=PICTURE if has_picture else None),
        )
        files = {
            one.name: {"bytes": one.stat().st_size, "sha256": sha256(one)} for one in sorted(staged.iterdir())
        }
        write_json(staged / MANIFEST, {"format": FORMAT, "files": files})
        return open_hub(hub).push(repo, staged, message=message, private=private)


def _mask_of(source: Path) -> Path:
    if not source.is_dir():
        return source
    for name in (names.CASCADE_MASK, names.MASK, HUB_MASK):
        if (source / name).exists():
            return source / name
    raise MaskFileError(f"{source} holds no mask file; what is pushed is a mask, not a network's weights")


def _read(path: Path) -> MaskFile:
    try:
        return read_mask_file(path)
    except WithoutWeightsError:
        return read_about(path)


def pull(repo: str, *, hub: str | Path | None = None, out: str | Path | None = None) -> Path:
    """Bring a repository here and return its folder, every file of it checked.

    Args:
        out: the folder, which must be new or empty; None: one in the user's cache, named by the content.

    Raises:
        HubError: there is no such repository, or it is not what its manifest says.
    """
    check_name(repo)
    with tempfile.TemporaryDirectory() as folder:
        fetched = Path(folder) / "fetched"
        fetched.mkdir()
        open_hub(hub).fetch(repo, (MANIFEST, HUB_MASK, CARD, PICTURE), fetched)
        stated = read_manifest(fetched, repo)
        for name, entry in stated.items():
            check_file(fetched / name, entry, repo)
        try:
            read_about(fetched / HUB_MASK)
        except MaskFileError as error:
            raise HubError(f"{repo}: {str(error).replace(str(fetched), repo)}") from error
        place = Path(out) if out is not None else _cache() / repo / str(stated[HUB_MASK]["sha256"])[:16]
        return _put(fetched, [*stated, MANIFEST], place, is_cache=out is None)


def _put(fetched: Path, files: list[str], place: Path, *, is_cache: bool) -> Path:
    if is_cache and (place / MANIFEST).exists():
        shutil.rmtree(place)  # what somebody changed there is not believed
    if place.exists() and any(place.iterdir()):
        raise HubError(f"{place} is not empty; name a new folder")
    place.mkdir(parents=True, exist_ok=True)
    for name in files:
        shutil.copyfile(fetched / name, place / name)
    return place


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "selfmask_dist" / "hub"
