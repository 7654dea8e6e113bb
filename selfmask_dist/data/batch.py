"""What the loader hands to training: one rank's part of a global batch.

Knows neither sources nor transforms. Rows of weight 0 do not count: they are padding, or samples that cannot
be read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from selfmask_dist.data.quarantine import Failure

Finish = Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Mixed:
    """What the rows of a batch were mixed with.

    labels: (rows,) int64 of the other pictures. shares: (rows,) float32 of the row's own picture, 1 where it
    was not mixed; the other one has the rest.
    """

    labels: Tensor
    shares: Tensor


@dataclass
class Batch:
    """One rank's part of a global batch.

    views: one tensor per view, each (rows, 3, height, width) float32, normalised.
    labels: (rows,) int64, -1 = none. weights: (rows,) float32, 1 for a sample and 0 for padding.
    ids: (rows,) int64, sample indices in the source; a padding row repeats a sample of the same global batch.
    global_count: samples in the global batch over all ranks, padding not counted. A sample that cannot be
        read counts: its part of the loss is 0, and each other sample weighs what it always does. Not counting
        it would need a sum over ranks at each step, and a gradient would depend on a reading error elsewhere.
    failures: samples of this rank that could not be read; their rows repeat another one, with weight 0.
    captions: one text per row where they were asked for, else empty; the text of a row of weight 0 means
        nothing.
    targets: what rows are trained towards where that is no label: (rows, outputs) float32, or label maps
        (rows, height, width) int64; None where it is `labels`. Those of a row of weight 0 mean nothing.
    finish: what is left to do to the views, once they are on their device; `to` does it. The last of the
        views is then no view: it says what to do, and stays on the CPU, where it is read.
    mixed: of pictures that were mixed with others; None where none are.
    """

    views: tuple[Tensor, ...]
    labels: Tensor
    weights: Tensor
    ids: Tensor
    global_count: int
    failures: tuple[Failure, ...] = ()
    finish: Finish | None = None
    captions: tuple[str, ...] = ()
    targets: Tensor | None = None
    mixed: Mixed | None = None

    def split(self, parts: int) -> list[Batch]:
        """Return micro-batches by rows; `global_count` stays the whole batch's, so losses add up."""
        if parts == 1:
            return [self]
        views = zip(*(view.chunk(parts) for view in self.views), strict=True)
        rows = zip(
            views, self.labels.chunk(parts), self.weights.chunk(parts), self.ids.chunk(parts), strict=True
        )
        found = [
            replace(self, views=views, labels=labels, weights=weights, ids=ids)
            for views, labels, weights, ids in rows
        ]
        if self.targets is not None:
            targets = self.targets.chunk(parts)
            found = [replace(batch, targets=one) for batch, one in zip(found, targets, strict=True)]
        if self.mixed is not None:
            mixed = map(Mixed, self.mixed.labels.chunk(parts), self.mixed.shares.chunk(parts))
            found = [replace(batch, mixed=one) for batch, one in zip(found, mixed, strict=True)]
        return found

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Return the batch on `device`, with its views finished there.

        non_blocking: the copy overlaps with computing where the batch is pinned.
        """
        moved = self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))
        if self.finish is None:
            return moved
        views = self.finish((*moved.views[:-1], self.views[-1]))
        return replace(moved, views=views, finish=None)

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory. The DataLoader's pinning thread calls this."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, fn: Any) -> Batch:
        return replace(
            self,
            views=tuple(fn(view) for view in self.views),
            labels=fn(self.labels),
            weights=fn(self.weights),
            ids=fn(self.ids),
            targets=None if self.targets is None else fn(self.targets),
            mixed=None if self.mixed is None else Mixed(fn(self.mixed.labels), fn(self.mixed.shares)),
        )
