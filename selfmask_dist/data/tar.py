"""One tar, header by header: WebDataset samples and where their bytes lie, without reading the pictures.

Knows neither labels nor images, only names, offsets and lengths. A key is a member's name up to the first dot
of its last part; consecutive members with one key are a sample. `tarfile` and every sequential reader stop
quietly at a damaged header or at a missing end mark and lose what follows; here each byte of the file is
accounted for, or the walk raises.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

# folder/name . extension, as webdataset splits it; hidden files and names without an extension are no members
_MEMBER_NAME = re.compile(r"^(?:\./)*((?:.*/)?[^./][^./]*)\.([^/]*)$")
_ZEROS = bytes(tarfile.BLOCKSIZE)


@dataclass
class TarSample:
    """Consecutive members that share a key. members: extension in lower case -> (offset, length) in bytes."""

    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)


def walk_samples(path: Path) -> Iterator[TarSample]:
    """The samples of one uncompressed tar, in file order.

    Raises ValueError naming the file and the last good member: not a tar, compressed, damaged, cut short, two
    tars joined, a link or a sparse member, a sample with two members of one extension.
    """
    sample: TarSample | None = None
    for info in _walk_members(path):
        match = _MEMBER_NAME.match(info.name)
        if match is None:
            continue
        key, extension = match.group(1), match.group(2).lower()
        if sample is None or sample.key != key:
            if sample is not None:
                yield sample
            sample = TarSample(key)
        if extension in sample.members:
            raise ValueError(
                f"{path}: member {info.name!r} appears twice in its sample; pack this shard again"
            )
        sample.members[extension] = (info.offset_data, info.size)
    if sample is not None:
        yield sample


def _walk_members(path: Path) -> Iterator[tarfile.TarInfo]:
    """Every regular file's header. The walk is the only place that knows tarfile's silences."""
    try:
        tar = tarfile.open(path, "r:")  # noqa: SIM115 - closed below; only its opening is guarded here
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(
            f"{path}: not a readable tar ({error}); pack it again, and unpack it first if it is compressed"
        ) from error
    last = "its start"
    with tar:
        while True:
            try:
                info = tar.next()
            except (tarfile.TarError, EOFError, ValueError) as error:
                raise _damaged(path, last, str(error)) from error
            if info is None:
                break
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps each header it met, about 1 KB
            last = f"member {info.name!r}"
            if info.isdir():
                continue
            if not info.isreg() or info.issparse():
                raise ValueError(
                    f"{path}: {last} is a link or a special file, which cannot be read by offset;"
                    " pack again with links followed (tar --dereference --hard-dereference)"
                )
            yield info
        _check_end(path, tar.offset, last)


def _check_end(path: Path, end: int, last: str) -> None:
    """Where the walk stopped there must be the end mark, and nothing but zeros after it."""
    with open(path, "rb") as file:
        file.seek(end)
        mark = file.read(tarfile.BLOCKSIZE)
        if len(mark) < tarfile.BLOCKSIZE:
            raise _damaged(path, last, "the file ends without the end-of-archive mark")
        if mark != _ZEROS:
            raise _damaged(path, last, f"the header at byte {end} is broken")
        while block := file.read(1 << 20):
            if block.count(0) != len(block):
                raise _damaged(path, last, "more data follows the end-of-archive mark, as in two tars joined")


def _damaged(path: Path, last: str, reason: str) -> ValueError:
    return ValueError(f"{path}: damaged or cut short after {last} ({reason}); copy or pack this shard again")
