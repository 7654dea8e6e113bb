"""A folder as a hub, `FOLDER/owner/name/`: for a shared disk, a mirror, and for tests."""

import os
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path

from selfmask_dist.models.repository import MANIFEST, HubError, check_listing, is_hub_name

_BLOCK = 2**22


class FolderHub:
    """Repositories in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def push(self, repo: str, folder: Path, *, message: str, private: bool) -> str:
        """See `Hub.push`; there are neither messages nor private repositories."""
        place = self._folder / repo
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = place.with_name(f".{place.name}.{os.getpid()}.partial")
        old = place.with_name(f".{place.name}.{os.getpid()}.old")
        try:
            shutil.copytree(folder, partial)
            if place.exists():
                place.rename(old)
            partial.rename(place)
        finally:
            for rest in (partial, old):
                shutil.rmtree(rest, ignore_errors=True)
        return str(place)

    def fetch(self, repo: str, wanted: Iterable[str], out: Path) -> None:
        """See `Hub.fetch`. Links are not followed, wherever they lead."""
        place = self._folder / repo
        if not place.is_dir():
            raise HubError(f"there is no repository {repo} in {self._folder}")
        for part in (place.parent, place):
            if part.is_symlink():
                raise HubError(f"{repo} is a link to another place; it is refused")
        found = list(place.rglob("*"))
        check_listing((path.relative_to(place).as_posix() for path in found), repo)
        for path in found:
            if path.is_symlink():
                raise HubError(f"{repo} holds the link {path.name}, which may lead anywhere; it is refused")
        for name in wanted:
            if (place / name).exists():
                _copy_plain(place / name, out / name, repo)

    def repositories(self, owner: str | None) -> list[str]:
        """See `Hub.repositories`."""
        found = self._folder.glob(f"*/*/{MANIFEST}")
        repos = sorted(path.parent.relative_to(self._folder).as_posix() for path in found)
        return [repo for repo in repos if is_hub_name(repo) and owner in (None, repo.partition("/")[0])]


def _copy_plain(path: Path, out: Path, repo: str) -> None:
    """Copy a file that is a file: no link, no pipe, whatever it became since it was looked at."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise HubError(f"{repo}: {path.name} is no plain file ({error.strerror})") from error
    with open(descriptor, "rb") as stream, open(out, "wb") as copy:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise HubError(f"{repo}: {path.name} is no plain file")
        shutil.copyfileobj(stream, copy, _BLOCK)
