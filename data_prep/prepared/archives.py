"""The publishers' archives of a data set: downloaded where they are absent, checked, unpacked once.

    ORIGINALS/NAME/train.tar.gz   downloaded, or put there by hand     ORIGINALS/NAME/train/   what it holds

A download that was stopped goes on where its server allows that. What was downloaded here is deleted once it
is unpacked; what was put there by hand stays. Knows no data set.
"""

from __future__ import annotations

import hashlib
import shutil
import tarfile
import urllib.error
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

_CHUNK = 1 << 20
_SECONDS = 60.0  # of silence that a server may keep


@dataclass(frozen=True)
class Archive:
    """url: where it is published. makes: the file or folder that is in it. md5: as published, else empty."""

    url: str
    makes: str
    md5: str = ""

    @property
    def name(self) -> str:
        """Return the file's name."""
        return self.url.rpartition("/")[2]


def bring_archives(archives: Iterable[Archive], folder: Path) -> None:
    """Bring what is absent of the archives' contents into a folder.

    Raises:
        OSError: a file cannot be downloaded, or the disk has no room for it; the message names the address.
        ValueError: a file is not the published one, or does not hold what it should.
    """
    for archive in archives:
        if (folder / archive.makes).exists():
            continue
        path = folder / archive.name
        is_ours = not path.exists()
        if is_ours:
            _download(archive.url, path)
        _check(path, archive.md5)
        _unpack(path, folder, archive.makes)
        if is_ours:
            path.unlink()


def _download(url: str, path: Path) -> None:
    partial = path.with_name(f".{path.name}.partial")
    start = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
            start = start if answer.status == 206 else 0  # without ranges it begins anew
            left = int(answer.headers.get("Content-Length") or 0)
            if left > (free := shutil.disk_usage(path.parent).free):
                raise OSError(f"{left / 1e9:.0f} GB are to come, and {free / 1e9:.0f} GB are free")
            bar = tqdm(total=start + left, initial=start, unit="B", unit_scale=True, desc=path.name)
            with open(partial, "ab" if start else "wb") as file, bar:
                while chunk := answer.read(_CHUNK):
                    file.write(chunk)
                    bar.update(len(chunk))
                if left and bar.n < start + left:
                    raise OSError(
                        f"the connection ended after {bar.n} of {start + left} bytes; once more goes on"
                    )
    except (OSError, urllib.error.URLError) as error:
        if (
            getattr(error, "code", None) == 416
        ):  # nothing is left behind what is there: the next call begins anew
            partial.unlink()
        raise OSError(f"{url} cannot be downloaded: {error}") from error
    partial.rename(path)


def _check(path: Path, md5: str) -> None:
    if not md5:
        return
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != md5:
        raise ValueError(
            f"{path} is not the published file (its MD5 is {found}, and {md5} was published); delete it"
        )


def _unpack(path: Path, folder: Path, makes: str) -> None:
    partial = folder / f".{makes}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a call that was killed
    try:
        if path.suffix == ".zip":
            shutil.unpack_archive(path, partial)
        else:
            _unpack_tar(path, partial)
    except (OSError, shutil.ReadError, EOFError, tarfile.TarError) as error:
        why = str(error).partition("\n")[0].rstrip(":")  # tarfile goes on with a line for each format
        raise ValueError(f"{path} cannot be unpacked ({why}); delete it") from error
    if (partial / makes).exists():
        (partial / makes).rename(folder / makes)
        shutil.rmtree(partial)
    elif "." not in makes:  # a folder whose files lie in the archive without it
        partial.rename(folder / makes)
    else:
        raise ValueError(f"{path} holds no {makes}; delete it")


def _unpack_tar(path: Path, folder: Path) -> None:
    with tarfile.open(path) as archive:
        if hasattr(tarfile, "data_filter"):  # Python 3.11.4
            archive.extractall(folder, filter="data")
            return
        for member in archive:
            if not (member.isfile() or member.isdir()) or not _is_within(folder, member.name):
                raise tarfile.TarError(f"its member {member.name!r} is no plain file within it")
            archive.extract(member, folder)


def _is_within(folder: Path, name: str) -> bool:
    return (folder / name).resolve().is_relative_to(folder.resolve())
