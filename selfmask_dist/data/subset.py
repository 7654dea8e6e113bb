"""A part of a source that is a source itself. Knows nothing of files."""

import hashlib
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from selfmask_dist.data.source import Sample, SampleError, Source

_ROWS = 1 << 20  # whose numbers are hashed together


class Subset:
    """A source of the samples of `source` at `indices`, renumbered from 0; see `Source`.

    Args:
        indices: (samples,), of any whole numbers.
        file: the .npy file that holds them. They are then mapped, and in memory once for all processes of a
            node: to a worker goes the file's name.
    """

    def __init__(self, source: Source, indices: np.ndarray, *, file: Path | None = None) -> None:
        self.source = source
        self.indices = indices
        self.classes = source.classes
        self._file = file
        self._stamp = None if file is None else _stamp(file)

    @classmethod
    def in_file(cls, source: Source, file: Path) -> Self:
        """Return the subset whose indices a .npy file lists.

        Raises OSError or ValueError where it is no such file.
        """
        # a plain array over the mapping: each indexing of a memmap costs microseconds
        return cls(source, np.asarray(np.load(file, mmap_mode="r", allow_pickle=False)), file=file)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | ({} if self._file is None else {"indices": None})

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        if self._file is not None:
            if _stamp(self._file) != self._stamp:
                raise ValueError(f"{self._file} changed while it was in use; start again to read it anew")
            self.indices = np.asarray(np.load(self._file, mmap_mode="r", allow_pickle=False))

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        return self.labels_of(slice(None))

    def labels_of(self, indices: npt.NDArray[np.int64] | slice) -> npt.NDArray[np.int64]:
        return self.source.labels_of(self.indices[indices])

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def identity(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for start in range(0, len(self), _ROWS):
            digest.update(np.ascontiguousarray(self.indices[start : start + _ROWS], dtype=np.int64).data)
        return self.source.identity | {"samples": len(self), "places": digest.hexdigest()[:16]}

    def key(self, index: int) -> str:
        return self.source.key(int(self.indices[index]))

    def where(self, index: int) -> str:
        return self.source.where(int(self.indices[index]))

    def read_many(self, indices: npt.NDArray[np.int64]) -> list[bytes | SampleError]:
        return self.source.read_many(self.indices[indices])

    def read(self, index: int) -> Sample:
        return self.source.read(int(self.indices[index]))

    @property
    def has_captions(self) -> bool:
        return self.source.has_captions

    def read_captions(self, indices: npt.NDArray[np.int64]) -> list[str | SampleError]:
        return self.source.read_captions(self.indices[indices])


def _stamp(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def hold_out(
    source: Source, share: float, *, setting: str = "data.held_out", purpose: str = ""
) -> tuple[Subset, Subset]:
    """Return the samples to train on, and about `share` of all that are held out, both in the source's order.

    A sample is held out by a hash of its key alone, so neither the order of the tars, nor the number of
    processes, nor other samples change its part. It costs a microsecond a sample and 8 bytes a process.

    Args:
        setting: the key that asks for it, for messages.
        purpose: goes into the hash, so that two purposes hold out parts that have nothing to do with each
            other.

    Raises:
        ValueError: one of the parts is empty.
    """
    limit = int(share * 2**64)
    is_held = np.fromiter(
        (_hash_of(source.key(index), purpose) < limit for index in range(len(source))),
        dtype=bool,
        count=len(source),
    )
    parts = np.flatnonzero(~is_held), np.flatnonzero(is_held)
    if not all(len(part) for part in parts):
        raise ValueError(
            f"holding out {share:g} of {len(source)} images leaves {len(parts[0])} to train on and "
            f"{len(parts[1])} to measure on; set {setting} to another share"
            + (", or name images in data.test" if setting == "data.held_out" else "")
        )
    return Subset(source, parts[0]), Subset(source, parts[1])


def _hash_of(key: str, purpose: str) -> int:
    text = key.encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8, person=purpose.encode()).digest())


def evenly_spaced(source: Source, limit: int) -> Source:
    """Return a source of at most `limit` samples at equal distances through `source`, the same every time."""
    if len(source) <= limit:
        return source
    return Subset(source, np.linspace(0, len(source) - 1, limit).round().astype(np.int64))
