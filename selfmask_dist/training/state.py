"""What a run is, as one object that is saved and restored whole, and the rule of when.

    tensors: scores and heads, momentum, moved statistics, the objective's buffers that changed (a queue)
    values:  position (step, epoch, batch), identity (backbone, method), data, means since the last log

Frozen weights are not in it; the backbone is pinned by its fingerprint. Learning rates and augmentation are
functions of the position, so there is no scheduler and no generator to save. Knows neither what an
objective's buffers mean nor how masks are laid out: the engine gathers and loads what it trains, by name.
"""

import time
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from selfmask_dist.objectives import Objective
from selfmask_dist.parallel import Engine
from selfmask_dist.parallel.trained import EngineState
from selfmask_dist.runs.checkpoint import Checkpoint, Saver
from selfmask_dist.runs.preempt import Preempted, StopRequest

_PARTS = tuple(part.name for part in fields(EngineState) if part.name != "step")  # tensors by name


@dataclass(frozen=True)
class Position:
    """Where training stands: `step` steps are done, the next batch is number `batch` of `epoch`.

    `is_measured`: the monitor that was due after this step has run.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    is_measured: bool = True


class RunningMeans(Protocol):
    """Means since the last log line, part of the state: the first line after a resume is then the same."""

    def state(self) -> dict[str, Any]: ...
    def load_state(self, state: dict[str, Any]) -> None: ...


class DataState(Protocol):
    """Where the data stands and what data it is; `check_state` raises ValueError, naming what differs."""

    def state_dict(self) -> dict[str, Any]: ...
    def check_state(self, state: dict[str, Any]) -> None: ...


class KeptState(Protocol):
    """A state that is kept beside the present one: whole tensors on the CPU by name, and a dict for JSON."""

    tensors: dict[str, Tensor]

    def values(self) -> dict[str, Any]: ...
    def load(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None: ...


class RunState:
    """Gathers and restores a run. Collective: every rank must make one.

    best: what `train.keep=best` is to leave, as far as it has come; None where the last state is left.

    Args:
        identity: what must be the same for a resume to make sense, each with a readable name.
        data: what is trained on; None where nothing is read.
    """

    def __init__(
        self,
        engine: Engine,
        objective: Objective,
        *,
        identity: dict[str, Any],
        data: DataState | None = None,
        best: KeptState | None = None,
    ) -> None:
        self._engine = engine
        self._data = data
        self._best = best
        self._objective = objective
        self._identity = identity
        self._buffers: dict[str, Tensor] = {}  # as they began; what stays so is not saved
        if not objective.buffers_all_change:
            self._buffers = {
                name: buffer.detach().clone() for name, buffer in objective.whole_buffers().items()
            }

    def capture(self, position: Position, *, telemetry: RunningMeans, metrics: dict[str, Any]) -> Checkpoint:
        """Return the state as it stands, copied to the CPU. Collective: every rank must call."""
        state = self._engine.state()
        tensors = {
            f"{part}/{name}": tensor for part in _PARTS for name, tensor in getattr(state, part).items()
        }
        for name, buffer in self._objective.whole_buffers().items():
            if name not in self._buffers or not torch.equal(buffer, self._buffers[name]):
                tensors[f"buffers/{name}"] = buffer.detach().cpu().clone()
        values = {
            "position": asdict(position),
            "identity": self._identity,
            "telemetry": telemetry.state(),
            "metrics": metrics,
            "data": self._data.state_dict() if self._data is not None else None,
        }
        if self._best is not None:
            tensors |= {f"best/{name}": tensor for name, tensor in self._best.tensors.items()}
            values["best"] = self._best.values()
        return Checkpoint({name: tensor.contiguous() for name, tensor in tensors.items()}, values)

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise a ValueError where a checkpoint is another run's, naming what differs."""
        theirs = checkpoint.values["identity"]
        for name in theirs | self._identity:
            if theirs.get(name) != (ours := self._identity.get(name)):
                raise ValueError(
                    f"the checkpoint is of another run: {name} was {theirs.get(name)!r} and is {ours!r} now; "
                    f"put it back, or start a new run with another run.name"
                )
        if self._data is not None:
            self._data.check_state(checkpoint.values["data"])

    @torch.no_grad()
    def restore(self, checkpoint: Checkpoint, *, telemetry: RunningMeans) -> Position:
        """Put a state back and return where to go on. Collective: every rank must call.

        Raises:
            ValueError: it is another run's.
        """
        self.check(checkpoint)
        parts: dict[str, dict[str, Tensor]] = {part: {} for part in (*_PARTS, "buffers", "best")}
        for key, tensor in checkpoint.tensors.items():
            part, _, name = key.partition("/")
            parts[part][name] = tensor
        position = Position(**checkpoint.values["position"])
        self._engine.load_state(EngineState(**{part: parts[part] for part in _PARTS}, step=position.step))
        moved = parts["buffers"]
        self._objective.load_buffers(self._buffers | moved)
        telemetry.load_state(checkpoint.values["telemetry"])
        if self._best is not None and "best" in checkpoint.values:
            self._best.load(parts["best"], checkpoint.values["best"])
        return position


class CheckpointSchedule:
    """Saves by time and by steps, and stops the run when asked to.

    Args:
        saver: on the main rank; None on the others.
        every_steps, every_seconds: 0 for never.
        is_asynchronous: write in the background; what is copied first stalls training.

    `stalled` counts the seconds that saving kept training waiting.
    """

    def __init__(
        self,
        state: RunState,
        stop: StopRequest,
        *,
        saver: Saver | None,
        every_steps: int = 0,
        every_seconds: float = 0.0,
        is_asynchronous: bool = True,
    ) -> None:
        self._state = state
        self._stop = stop
        self._saver = saver
        self._every_steps = every_steps
        self._every_seconds = every_seconds
        self._is_asynchronous = is_asynchronous
        self.stalled = 0.0
        self._last_time = time.monotonic()
        self._last_step = -1
        self.metrics: dict[str, Any] = {}  # the newest of the monitor

    def votes(self) -> tuple[float, float]:
        """Return this rank's votes to stop and to save, which the trainer sums over ranks.

        Only the main rank has a clock, and a save waits for the one before it.
        """
        waited = time.monotonic() - self._last_time
        is_due = (
            self._saver is not None
            and bool(self._every_seconds)
            and waited >= self._every_seconds
            and not self._saver.is_busy
        )
        return float(self._stop.requested), float(is_due)

    def after_step(
        self, position: Position, telemetry: RunningMeans, *, stop: bool, due: bool, is_last: bool = False
    ) -> None:
        """Save where it is time to. Collective: every rank must call with equal arguments.

        Raises:
            Preempted: `stop`; what was trained so far is committed.
        """
        by_steps = bool(self._every_steps) and position.step % self._every_steps == 0
        if not (stop or due or by_steps or is_last):
            return
        if position.step != self._last_step or stop:
            self._save(position, telemetry)
        if self._saver is not None and (stop or not self._is_asynchronous):
            self._saver.finish()
        if stop:
            raise Preempted

    def save_again(self, position: Position, telemetry: RunningMeans) -> None:
        """Save the state as it stands, whatever was saved at this step before. Collective."""
        self._save(position, telemetry)

    def finish(self) -> None:
        """Wait for what is being written."""
        if self._saver is not None:
            self._saver.finish()

    def _save(self, position: Position, telemetry: RunningMeans) -> None:
        start = time.perf_counter()
        checkpoint = self._state.capture(position, telemetry=telemetry, metrics=self.metrics)
        if self._saver is not None:
            self._saver.save(checkpoint, step=position.step)
        self._last_time, self._last_step = time.monotonic(), position.step
        self.stalled += time.perf_counter() - start
