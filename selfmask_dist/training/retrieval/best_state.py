"""The trained state with the highest instance retrieval so far, which `train.keep=best` leaves."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from selfmask_dist.evals.instance_retrieval import MEASURE
from selfmask_dist.objectives import Objective
from selfmask_dist.parallel import Engine
from selfmask_dist.parallel.trained import EngineState

Monitor = Callable[[int], dict[str, Any]]
_MONITORED = f"monitor/{MEASURE}"


class BestState:
    """The trained state with the highest instance retrieval so far, a part of every checkpoint.

    What is kept is what a run leaves: parameters, running statistics and, where the head is kept, the
    objective's buffers; whole and on the CPU, without momentum. Each process takes that much memory. Every
    method is a collective: every rank must call.
    """

    def __init__(self, engine: Engine, objective: Objective) -> None:
        self._engine = engine
        self._objective = objective
        self.value = -1.0
        self.step = 0  # after which it stood
        self.last_step = 0  # after which the newest measurement was
        self.tensors: dict[str, Tensor] = {}  # part/name
        self._masks_step = 0

    def after(self, monitor: Monitor) -> Monitor:
        """Return the monitor, which then offers each state that it has measured."""

        def watch(step: int) -> dict[str, Any]:
            values = monitor(step)
            self.offer(step, values[_MONITORED])
            return values

        return watch

    def offer(self, step: int, value: float) -> None:
        """Keep the state as it stands where its instance retrieval is higher than all before; of equal ones
        the earliest stays.
        """
        self.last_step = step
        if value <= self.value:
            return
        state = self._engine.state()
        self.value, self.step, self._masks_step = value, step, state.step
        parts = {"parameters": state.parameters, "statistics": state.statistics, "buffers": {}}
        if self._objective.classifies:  # other heads are thrown away, and their buffers may be long queues
            buffers = self._objective.whole_buffers()
            parts["buffers"] = {name: buffer.detach().cpu().clone() for name, buffer in buffers.items()}
        self.tensors = {
            f"{part}/{name}": tensor for part, found in parts.items() for name, tensor in found.items()
        }

    def put_back(self) -> None:
        """Make the kept state the present one. What is trained further from here has no momentum."""
        parts: dict[str, dict[str, Tensor]] = {"parameters": {}, "statistics": {}, "buffers": {}}
        for key, tensor in self.tensors.items():
            part, _, name = key.partition("/")
            parts[part][name] = tensor
        self._engine.load_state(
            EngineState(parts["parameters"], {}, parts["statistics"], step=self._masks_step)
        )
        if self._objective.classifies:
            self._objective.load_buffers(parts["buffers"])

    def values(self) -> dict[str, Any]:
        """Return what a checkpoint keeps beside the tensors."""
        return {
            "value": self.value,
            "step": self.step,
            "last_step": self.last_step,
            "masks_step": self._masks_step,
        }

    def load(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Go on from what a checkpoint kept."""
        self.tensors = tensors
        self.value, self.step = values["value"], values["step"]
        self.last_step, self._masks_step = values["last_step"], values["masks_step"]
