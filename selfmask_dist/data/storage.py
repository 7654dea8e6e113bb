"""Bytes out of shards: `pread` from files that may be opened before and after, in any process.

Knows shards by number, and nothing of samples. `remote` has the same protocol for shards that are elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

_MAX_OPEN_SHARDS = 64  # per process; far below the usual limit of 1024 descriptors


class Storage(Protocol):
    """Where shards are. Picklable, and safe to read from any process that received it."""

    def read(self, shard: int, offset: int, length: int) -> bytes:
        """Up to `length` bytes, fewer where the shard ends. Raises OSError where they cannot be had."""
        ...

    def close(self) -> None:
        """Let go of what this process holds open; a later `read` opens it again."""
        ...


class LocalStorage:
    """Shards on a local or shared file system. A shard that changes after this was made is an OSError."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = list(paths)
        self._stamps = [_stamp(os.stat(path)) for path in paths]
        self._descriptors: dict[int, int] = {}

    def read(self, shard: int, offset: int, length: int) -> bytes:
        return os.pread(self._descriptor(shard), length, offset)

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __del__(self) -> None:
        if hasattr(self, "_descriptors"):
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_descriptors": {}}  # a descriptor means nothing in another process

    def _descriptor(self, shard: int) -> int:
        descriptor = self._descriptors.get(shard)
        if descriptor is None:
            if len(self._descriptors) >= _MAX_OPEN_SHARDS:
                os.close(self._descriptors.pop(next(iter(self._descriptors))))
            descriptor = os.open(self._paths[shard], os.O_RDONLY | os.O_CLOEXEC)
            if _stamp(os.fstat(descriptor)) != self._stamps[shard]:
                os.close(descriptor)
                raise OSError("the shard changed after it was opened; start again to read its new headers")
            self._descriptors[shard] = descriptor
        return descriptor


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns
