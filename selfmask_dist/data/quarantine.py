"""Samples that fail while a run goes on: listed, counted, and a stop where there are too many.

Knows neither process groups nor trainers: `failed` is this rank's count of the epoch, the caller sums it over
ranks and hands the sum to `check`. A sample appears once in an epoch over all ranks, so the sum is exact:

    failed on all ranks in this epoch > budget * samples  ->  QuarantineError
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from selfmask_dist.common.text import some


class QuarantineError(ValueError):
    """More samples failed than the budget allows; the message names the first ones."""


@dataclass(frozen=True)
class Failure:
    """One sample that could not be used. id: in the source. reason: names shard and key too."""

    id: int
    key: str
    reason: str


class Quarantine:
    """Keeps count of one rank's failures, and writes each as a line of `path` (shared by all ranks).

    budget: share of the data set's samples that may fail in an epoch; 0 stops at the first.
    """

    def __init__(self, path: Path, *, num_samples: int, budget: float, rank: int = 0) -> None:
        if not 0 <= budget < 1:
            raise ValueError(f"the budget of broken samples is {budget}; it must be in 0..1, below 1")
        self.path, self.rank = path, rank
        self.budget = budget
        self.allowed = math.floor(budget * num_samples)
        self._epoch = 0
        self._before = 0  # failures of this epoch in earlier lives of the run, which rank 0 counts
        self._failures: list[Failure] = []

    @property
    def failed(self) -> int:
        """The failures of this rank in the current epoch; on rank 0 also all before a resume."""
        return self._before + len(self._failures)

    def start_epoch(self, epoch: int, *, first_step: int = 0) -> None:
        """Count from zero, or on from what the file says of this epoch's steps before `first_step`."""
        self._epoch, self._failures = epoch, []
        self._before = self._count_before(first_step) if self.rank == 0 and first_step > 0 else 0

    def _count_before(self, first_step: int) -> int:
        """Count each sample once: after a resume, what followed the checkpoint is read and listed again."""
        found: set[int] = set()
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            with contextlib.suppress(ValueError):  # a line that a kill or a full disk cut short
                entry = json.loads(line)
                if entry["epoch"] == self._epoch and entry["step"] < first_step:
                    found.add(entry["id"])
        return len(found)

    def record(self, failures: Sequence[Failure], *, step: int) -> None:
        """Note a batch's failures. Raises QuarantineError where this rank alone exceeds the budget."""
        if not failures:
            return
        self._failures += failures
        lines = [
            {"time": round(time.time(), 3), "rank": self.rank, "epoch": self._epoch, "step": step}
            | {"id": failure.id, "key": failure.key, "reason": failure.reason}
            for failure in failures
        ]
        data = "".join(json.dumps(line) + "\n" for line in lines).encode()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # one write in append mode: lines of several ranks do not mix
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            os.write(descriptor, data)
        finally:
            os.close(descriptor)
        self.check(self.failed)

    def check(self, total: int) -> None:
        """Raise QuarantineError where `total`, the sum of `failed` over all ranks, exceeds the budget."""
        if total <= self.allowed:
            return
        named = some([failure.reason for failure in self._failures]) or "they are other ranks', or of before"
        raise QuarantineError(
            f"{total} samples failed in epoch {self._epoch}, more than the {self.allowed} that the budget of"
            f" {self.budget:g} allows: {named}. All are listed in {self.path}; mend them, or run"
            " selfmask data index again, which leaves them out"
        )
