"""What is believed of a repository: its list of files, its manifest, and files that are what it states."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from selfmask_dist.common.files import sha256

HUB_MASK = "model.mask"
MANIFEST = "manifest.json"
CARD = "README.md"
PICTURE = "sparsity.png"
TAG = "self-masking-networks"
FORMAT = 1
_MAX_MANIFEST = 2**20  # bytes
_MAX_FILES = 10_000  # names in a repository
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,95}/[A-Za-z0-9][A-Za-z0-9_.\-]{0,95}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
# what a library may execute when it reads it, or is a program
_UNSAFE = (
    *(".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib", ".dill", ".npy", ".npz", ".h5", ".keras"),
    *(".py", ".pyc", ".so", ".dll", ".dylib", ".exe", ".sh", ".bat", ".jar", ".zip", ".tar"),
)


class HubError(ValueError):
    """A repository that is not there, is damaged, or holds what is not to be read."""


def is_hub_name(text: str) -> bool:
    """Return whether a text is `owner/name`."""
    return _NAME.fullmatch(text) is not None and ".." not in text


def check_name(repo: str) -> None:
    """Raise HubError where a text is not `owner/name`."""
    if not is_hub_name(repo):
        raise HubError(
            f"{repo[:100]!r} is no name of a repository; write owner/name (letters, digits, . _ -)"
        )


def check_listing(listed: Iterable[str], repo: str) -> None:
    """Raise HubError where a repository's list of files has what is not to be read.

    Args:
        listed: paths inside the repository.
    """
    for number, name in enumerate(listed):
        if number >= _MAX_FILES:
            raise HubError(f"{repo} holds more than {_MAX_FILES:,} files; it is no repository of a mask")
        parts = name.split("/")
        if name.startswith("/") or "\\" in name or "\0" in name or ".." in parts:
            raise HubError(f"{repo} holds a file called {name[:100]!r}, which leads out of it; it is refused")
        if parts[-1].lower().endswith(_UNSAFE):
            raise HubError(
                f"{repo} holds {name[:100]!r}, which programs execute when they read it; a mask needs no "
                "such file, and the repository is refused"
            )


def read_manifest(folder: Path, repo: str) -> dict[str, dict[str, Any]]:
    """Return size and SHA-256 of a repository's files by name, as its manifest states them.

    Raises:
        HubError: there is none, or it cannot be.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise HubError(f"{repo} has no {MANIFEST}: it was not pushed by selfmask hub push")
    if path.stat().st_size > _MAX_MANIFEST:
        raise HubError(f"{repo}: {MANIFEST} takes more than {_MAX_MANIFEST:,} bytes")
    try:
        stated = json.loads(path.read_bytes())
        if stated["format"] != FORMAT:
            raise ValueError(f"format {stated['format']!r}; this selfmask_dist reads {FORMAT}")
        files: dict[str, dict[str, Any]] = dict(stated["files"])
        if HUB_MASK not in files or not files.keys() <= {HUB_MASK, CARD, PICTURE}:
            raise ValueError(f"it lists {sorted(files)[:5]}")
        for entry in files.values():
            if type(entry["bytes"]) is not int or _DIGEST.fullmatch(entry["sha256"]) is None:
                raise ValueError("a file's size or SHA-256 is none")
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise HubError(f"{repo} has a {MANIFEST} that cannot be: {error}") from error
    return files


def check_file(path: Path, entry: dict[str, Any], repo: str) -> None:
    """Raise HubError where a file is not the one that the manifest lists."""
    if path.is_symlink() or not path.is_file():
        raise HubError(f"{repo} has no plain file {path.name}, which its {MANIFEST} lists")
    if path.stat().st_size != entry["bytes"] or sha256(path) != entry["sha256"]:
        raise HubError(
            f"{repo}: {path.name} is not the file that {MANIFEST} lists; it is damaged or replaced"
        )
