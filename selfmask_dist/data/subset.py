"""A part of a source that is a source itself. Knows nothing of files."""

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

from selfmask_dist.data.source import Sample, SampleError, Source


class Subset:
    """A source of the samples of `source` at `indices`, renumbered from 0; see `Source`."""

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        self._source = source
        self._indices = indices
        self.classes = source.classes
        self.labels = source.labels[indices]

    def __len__(self) -> int:
        return len(self._indices)

    @property
    def identity(self) -> dict[str, Any]:
        chosen = hashlib.sha256(np.ascontiguousarray(self._indices, dtype=np.int64).data).hexdigest()[:16]
        return self._source.identity | {"samples": len(self), "places": chosen}

    def key(self, index: int) -> str:
        return self._source.key(int(self._indices[index]))

    def where(self, index: int) -> str:
        return self._source.where(int(self._indices[index]))

    def read_many(self, indices: npt.NDArray[np.int64]) -> list[bytes | SampleError]:
        return self._source.read_many(self._indices[indices])

    def read(self, index: int) -> Sample:
        return self._source.read(int(self._indices[index]))

    @property
    def has_captions(self) -> bool:
        return self._source.has_captions

    def read_captions(self, indices: npt.NDArray[np.int64]) -> list[str | SampleError]:
        return self._source.read_captions(self._indices[indices])


def evenly_spaced(source: Source, limit: int) -> Source:
    """Return a source of at most `limit` samples at equal distances through `source`, the same every time."""
    if len(source) <= limit:
        return source
    return Subset(source, np.linspace(0, len(source) - 1, limit).round().astype(np.int64))
