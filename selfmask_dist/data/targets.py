"""What samples are trained towards beside one class, as tensors: several labels, numbers, label maps.

    multilabel   (n, classes) float32, 1 where a sample is of a class
    regression   (n, quantities) float32, as they are in the shards
    dense        the encoded `.seg.png` of each sample; the loader decodes it beside its picture

Knows neither losses nor heads; `indexing.targets` says how shards hold them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from selfmask_dist.data.indexing.targets import IndexTargets
from selfmask_dist.data.source import SampleError, Source, TarSource
from selfmask_dist.data.subset import Subset
from selfmask_dist.data.views.dense import IGNORED

__all__ = ["IGNORED", "TargetKind", "TargetSummary", "Targets", "open_targets"]

TargetKind = Literal["multilabel", "regression", "dense"]
Rows = npt.NDArray[np.int64]
_ROWS = 1 << 14  # that are looked at together
_FORMS = {
    "multilabel": 'no list of labels: its .json needs {"labels": [0, 4]}, class numbers, each once',
    "regression": 'no numbers: its .json needs {"value": 1.5} or {"values": [1.5, 2]}, finite',
    "dense": "no label map: it needs a .seg.png beside its picture",
}


@dataclass(frozen=True)
class TargetSummary:
    """What an objective may know of its training data's targets.

    outputs: a name for each. num_samples: how many there are. mean, deviation: (outputs,) float64 over the
    samples; of several labels the mean is each class's share. None for label maps, which nobody reads ahead.
    """

    outputs: tuple[str, ...]
    num_samples: int
    mean: Tensor | None = None
    deviation: Tensor | None = None


@dataclass(frozen=True)
class Targets:
    """The targets of one kind, for the training source and for others with the same outputs.

    outputs: the classes' names, or those of the quantities, in order.
    """

    kind: TargetKind
    outputs: tuple[str, ...]

    def of(self, source: Source, indices: Rows) -> Tensor:
        """Return (n, outputs) float32 of samples that `check` has seen; not for label maps."""
        tars, rows = _in_tars(source, indices)
        column = tars.index.targets.labels if self.kind == "multilabel" else tars.index.targets.values
        assert column is not None, self.kind
        found = torch.zeros(len(rows), len(self.outputs))
        for place, row in enumerate(rows.tolist()):
            numbers = column.row(row)
            if self.kind == "multilabel":
                found[place, torch.from_numpy(numbers.astype(np.int64))] = 1
            else:
                found[place] = torch.from_numpy(numbers.astype(np.float32))
        return found

    def maps(self, source: Source, indices: Rows) -> list[bytes | SampleError]:
        """Return the encoded label map of each of the samples `indices`, or why it cannot be had."""
        tars, rows = _in_tars(source, indices)
        targets = tars.index.targets
        assert targets.map_offset is not None
        assert targets.map_length is not None
        lengths = targets.map_length[rows]
        read = tars.read_members(rows, targets.map_offset[rows], lengths)
        return [
            SampleError(f"{tars.where(int(row))}: its label map cannot be read; mend it or leave it out")
            if isinstance(data, OSError) or len(data) != length
            else data
            for row, data, length in zip(rows, read, lengths.tolist(), strict=True)
        ]

    def check(self, source: Source, split: str) -> None:
        """Raise ValueError naming the first sample without a target, or with one of another shape.

        Args:
            split: what messages call the source, `data.test`.
        """
        for first, tars, rows in _parts(source):
            counts, largest, why = _counts(tars, rows, self.kind), -1, _FORMS[self.kind]
            bad = counts < 0
            if self.kind == "regression" and not bad.any():
                bad = counts != len(self.outputs)
                why = f"other numbers than the {len(self.outputs)} of data.train"
            elif self.kind == "multilabel" and not bad.any():
                largest_of = _largest(tars, rows)
                bad, largest = largest_of >= len(self.outputs), int(largest_of.max(initial=-1))
                why = f"label {largest}, and there are {len(self.outputs)} classes (0 to "
                why += f"{len(self.outputs) - 1})"
            if bad.any():
                where = source.where(first + int(np.argmax(bad)))
                raise ValueError(
                    f"{split}: {where} has {why}. objective.target={self.kind} needs a target of each of the "
                    f"{len(source)} images; add it, or leave out the sample (docs/targets.md)"
                )

    def summary(self, source: Source) -> TargetSummary:
        """Return what an objective may know of its training data."""
        if self.kind == "dense":
            return TargetSummary(self.outputs, len(source))
        total = torch.zeros(len(self.outputs), dtype=torch.float64)
        for part in _slices(len(source)):
            total += self.of(source, part).double().sum(dim=0)
        mean, squares = total / len(source), torch.zeros_like(total)
        for part in _slices(len(source)):
            squares += (self.of(source, part).double() - mean).square().sum(dim=0)
        return TargetSummary(self.outputs, len(source), mean, (squares / len(source)).sqrt())


def open_targets(source: Source, kind: TargetKind) -> Targets:
    """Return the targets of the training source.

    Names are those of `dataset.json`; without it numbers stand for classes and quantities.

    Raises:
        ValueError: a sample has no target, or nothing says how many classes label maps have.
    """
    tars, _ = _in_tars(source, np.zeros(0, dtype=np.int64))
    targets: IndexTargets = tars.index.targets
    named = tars.index.classes
    if kind == "dense":
        if named is None:
            raise ValueError(
                "data.train: nothing says which classes its label maps have; list their names in order in "
                "a dataset.json beside the tars (selfmask data convert maps writes it), or index with: "
                f"selfmask data index {tars.folder} --classes A,B,..."
            )
        found = Targets(kind, named)
    elif kind == "multilabel":
        largest = max(int(_largest(tars, rows).max(initial=-1)) for _, tars, rows in _parts(source))
        found = Targets(kind, named or tuple(map(str, range(largest + 1))))
    else:
        width = 0 if targets.values is None else int(targets.values.counts().max(initial=0))
        if named is not None and len(named) == width and not (tars.index.label >= 0).any():
            found = Targets(kind, named)
        else:
            found = Targets(kind, ("value",) if width == 1 else tuple(f"value {n}" for n in range(width)))
    found.check(source, "data.train")
    if not found.outputs:
        raise ValueError("data.train: no image has any label, so that there is nothing to learn")
    return found


def _in_tars(source: Source, indices: Rows) -> tuple[TarSource, Rows]:
    """Return the tars below a source, and the rows of their index that some of its samples are."""
    while isinstance(source, Subset):
        source, indices = source.source, np.asarray(source.indices[indices], dtype=np.int64)
    assert isinstance(source, TarSource), type(source)
    return source, indices


def _slices(length: int) -> Iterator[Rows]:
    for start in range(0, length, _ROWS):
        yield np.arange(start, min(start + _ROWS, length))


def _parts(source: Source) -> Iterator[tuple[int, TarSource, Rows]]:
    """Yield the first sample of each part of a source, the tars, and the part's rows in their index."""
    for part in _slices(len(source)):
        yield int(part[0]), *_in_tars(source, part)


def _counts(tars: TarSource, rows: Rows, kind: TargetKind) -> Rows:
    """Return how many numbers each row has, (n,); -1 for none at all."""
    targets = tars.index.targets
    if kind == "dense":
        if targets.map_length is None:
            return np.full(len(rows), -1)
        lengths = targets.map_length[rows].astype(np.int64)
        return np.where(lengths > 0, lengths, -1)
    column = targets.labels if kind == "multilabel" else targets.values
    if column is None:
        return np.full(len(rows), -1)
    if kind == "multilabel":
        is_absent = [len(found := column.row(row)) == 1 and found[0] < 0 for row in rows.tolist()]
        return np.where(np.array(is_absent, dtype=bool), -1, 0)
    counts = np.array([len(column.row(row)) for row in rows.tolist()], dtype=np.int64)
    return np.where(counts > 0, counts, -1)


def _largest(tars: TarSource, rows: Rows) -> Rows:
    """Return the largest label of each row, (n,); -1 for none."""
    column = tars.index.targets.labels
    if column is None:
        return np.full(len(rows), -1)
    return np.array([int(column.row(row).max(initial=-1)) for row in rows.tolist()], dtype=np.int64)
