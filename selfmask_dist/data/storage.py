"""Bytes out of shards: `pread` from files that may be opened before and after, in any process or thread.

Knows shards by number, and nothing of samples. `remote` has the same protocol for shards that are elsewhere.
Not `mmap`: a shared file system that fails under a mapping kills the process (SIGBUS), where `pread` gives an
error that names the sample.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Sequence
from os import pread
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

_MAX_OPEN_SHARDS = 64  # per process; far below the usual limit of 1024 descriptors
_SLOW = 1e-4  # seconds; a read from the page cache takes less, one from a disk or a network more


class Storage(Protocol):
    """Reads bytes of shards. Picklable, and safe in all threads of any process that received it."""

    def read_many(
        self, shards: Sequence[int], offsets: Sequence[int], lengths: Sequence[int]
    ) -> list[bytes | OSError]:
        """Return for each i the `lengths[i]` bytes from `offsets[i]` of shard `shards[i]`, or why they cannot
        be had.

        They are fewer where the shard ends.
        """
        ...

    def close(self) -> None:
        """Let go of what this process holds open; a later `read_many` opens it again."""
        ...


class LocalStorage:
    """Reads shards on a local or shared file system. One that changed after this was made is an OSError.

    sizes: bytes of each, where they are known; they are then held against a shard when it is first opened,
        and no shard is looked at before. In place of it, and of what changed before, stands the crc32.
    """

    def __init__(self, paths: Sequence[Path], *, sizes: Sequence[int] | None = None) -> None:
        self._paths = list(paths)
        self._sizes = None if sizes is None else list(sizes)
        self._stamps: dict[int, tuple[int, int]] = {}
        if sizes is None:
            self._stamps = {number: _stamp(os.stat(path)) for number, path in enumerate(paths)}
        self._files: dict[int, _File] = {}
        self._opening = threading.Lock()

    def read_many(
        self, shards: Sequence[int], offsets: Sequence[int], lengths: Sequence[int]
    ) -> list[bytes | OSError]:
        """Read as `Storage` says; where the first read is slow, the kernel is asked for the others ahead."""
        start = perf_counter()
        found = self._read(shards[:1], offsets[:1], lengths[:1])
        rest = (shards[1:], offsets[1:], lengths[1:])
        if perf_counter() - start > _SLOW and hasattr(os, "posix_fadvise"):  # which macOS lacks
            self._ask_for(*rest)
        return found + self._read(*rest)

    def _read(
        self, shards: Sequence[int], offsets: Sequence[int], lengths: Sequence[int]
    ) -> list[bytes | OSError]:
        try:
            # without Python between the reads: a tenth of the time that a page in memory takes
            files = {shard: self._files.get(shard) or self._open(shard) for shard in set(shards)}
            return list(map(pread, [files[shard].descriptor for shard in shards], lengths, offsets))
        except OSError:
            return self._read_each(shards, offsets, lengths)

    def _read_each(
        self, shards: Sequence[int], offsets: Sequence[int], lengths: Sequence[int]
    ) -> list[bytes | OSError]:
        """Read one by one, where some cannot be read."""
        found: list[bytes | OSError] = []
        for shard, offset, length in zip(shards, offsets, lengths, strict=True):
            try:
                file = self._files.get(shard) or self._open(shard)
                found.append(pread(file.descriptor, length, offset))
            except OSError as error:
                found.append(error)
        return found

    def _ask_for(self, shards: Sequence[int], offsets: Sequence[int], lengths: Sequence[int]) -> None:
        """Tell the kernel what is read next: a disk serves many requests in the time of a few."""
        for shard, offset, length in zip(shards, offsets, lengths, strict=True):
            with contextlib.suppress(OSError):  # reading it will say what is wrong
                file = self._files.get(shard) or self._open(shard)
                os.posix_fadvise(file.descriptor, offset, length, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Close this process's files; a later read opens them again."""
        self._files.clear()

    def __getstate__(self) -> dict[str, Any]:
        # descriptors and locks mean nothing in another process
        return {"_paths": self._paths, "_sizes": self._sizes, "_stamps": self._stamps}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_files": {}, "_opening": threading.Lock()}

    def _open(self, shard: int) -> _File:
        with self._opening:
            if len(self._files) >= _MAX_OPEN_SHARDS:
                del self._files[next(iter(self._files))]
            file = _File(self._paths[shard])
            stamp = _stamp(os.fstat(file.descriptor))
            if self._sizes is not None and stamp[0] != self._sizes[shard]:
                raise OSError(
                    f"the shard has {stamp[0]} bytes and had {self._sizes[shard]} when it was indexed; copy"
                    " it again, or index it again"
                )
            if stamp != self._stamps.setdefault(shard, stamp):
                raise OSError("the shard changed after it was opened; start again to read its new headers")
            self._files[shard] = file
            return file


class _File:
    """A descriptor that closes when nobody reads from it any more: another thread may just have begun."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns
