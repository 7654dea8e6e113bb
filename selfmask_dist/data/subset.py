"""A part of a source that is a source itself. Knows nothing of files."""

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

from selfmask_dist.data.source import Sample, SampleError, Source


class Subset:
    """A source of the samples of `source` at `indices`, renumbered from 0; see `Source`."""

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        self.source = source
        self.indices = indices
        self.classes = source.classes
        self.labels = source.labels[indices]

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def identity(self) -> dict[str, Any]:
        chosen = hashlib.sha256(np.ascontiguousarray(self.indices, dtype=np.int64).data).hexdigest()[:16]
        return self.source.identity | {"samples": len(self), "places": chosen}

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


def evenly_spaced(source: Source, limit: int) -> Source:
    """Return a source of at most `limit` samples at equal distances through `source`, the same every time."""
    if len(source) <= limit:
        return source
    return Subset(source, np.linspace(0, len(source) - 1, limit).round().astype(np.int64))
