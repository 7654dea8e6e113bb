"""The best of the trained states so far, by a measure, which `train.keep=best` leaves."""

from dataclasses import replace
from typing import Any

import torch

from selfmask_dist.objectives import Objective
from selfmask_dist.parallel import Engine
from selfmask_dist.parallel.parts import KeptParts, StateSource, TensorPart
from selfmask_dist.training.state import buffer_parts, load_buffers

_PARTS = ("parameters", "statistics")  # of an EngineState


class BestState:
    """The best of the trained states that were measured so far, a part of every checkpoint.

    What is kept is what a run leaves: parameters, running statistics and, where the head is kept, the
    objective's buffers; on the CPU, without momentum. Each process keeps its own parts of it. Every method is
    a collective: every rank must call.

    Args:
        by: the measure's name; the lowest loss is the best, and the highest of anything else.
        patience: measurements in a row that are no better, after which the training is to end; None for any.
    """

    def __init__(
        self,
        engine: Engine,
        objective: Objective,
        *,
        by: str = "instance_retrieval",
        patience: int | None = None,
    ) -> None:
        self._engine = engine
        self._objective = objective
        self.by = by
        self.patience = patience
        self._no_better = 0  # measurements in a row
        self.value: float | None = None
        self.step = 0  # after which it stood
        self.last_step = 0  # after which the newest measurement was
        self._parts: list[TensorPart] = []
        self._masks_step = 0

    def offer(self, step: int, value: float) -> None:
        """Keep the state as it stands where its measure is better than all before; of equal ones the earliest
        stays.
        """
        self.last_step = step
        if not self._is_better(value):
            self._no_better += 1
            return
        self._no_better = 0
        self.value, self.step, self._masks_step = value, step, self._engine.masks_step
        self._parts = [
            replace(part, tensor=part.tensor.detach().cpu().clone()) for part in self._present_parts()
        ]

    def _is_better(self, value: float) -> bool:
        if self.value is None:
            return True
        return value < self.value if self.by == "loss" else value > self.value

    def has_run_out(self) -> bool:
        """Return whether so many measurements were no better that the training is to end."""
        return self.patience is not None and self._no_better >= self.patience

    def put_back(self) -> None:
        """Make the kept state the present one. What is trained further from here has no momentum."""
        kept = KeptParts(self._parts)
        self._engine.load(kept, step=self._masks_step, parts=_PARTS)
        if self._objective.classifies:
            load_buffers(self._objective, kept)

    def _present_parts(self) -> list[TensorPart]:
        """Return what is kept of the state, as it stands."""
        parts = [part for part in self._engine.parts() if part.name.partition("/")[0] in _PARTS]
        if self._objective.classifies:  # other heads are thrown away, and their buffers may be long queues
            parts += buffer_parts(self._objective, self._engine.world)
        return parts

    def parts(self) -> list[TensorPart]:
        """Return this process's parts of the kept state, which a checkpoint has as well."""
        return self._parts

    def values(self) -> dict[str, Any]:
        """Return what a checkpoint keeps beside the tensors."""
        return {
            "value": self.value,
            "step": self.step,
            "last_step": self.last_step,
            "no_better": self._no_better,
            "masks_step": self._masks_step,
        }

    def load(self, source: StateSource, values: dict[str, Any]) -> None:
        """Go on from what a checkpoint kept: of each tensor, what this process holds."""
        self._parts = []
        for part in self._present_parts() if source.shapes else ():
            kept = replace(part, tensor=torch.empty(part.tensor.shape, dtype=part.tensor.dtype))
            source.read_into(kept)
            self._parts.append(kept)
        self.value, self.step = values["value"], values["step"]
        self.last_step, self._masks_step = values["last_step"], values["masks_step"]
        self._no_better = values.get("no_better", 0)  # which older checkpoints do not have
