"""What a run is, as one object that is saved and restored whole, and the rule of when.

    tensors: scores and heads, momentum, moved statistics, the objective's buffers that changed (a queue)
    values:  position (step, epoch, batch), identity (backbone, method), data, means since the last log

Frozen weights are not in it; the backbone is pinned by its fingerprint. Learning rates and augmentation are
functions of the position, so there is no scheduler and no generator to save. No process holds it whole: each
has parts of tensors, which it writes and reads by name and range. Knows neither what an objective's buffers
mean nor how masks are laid out.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from selfmask_dist.objectives import Objective
from selfmask_dist.parallel import Engine, World
from selfmask_dist.parallel.parts import StateSource, TensorPart
from selfmask_dist.runs.checkpoint import OpenCheckpoint, Saver
from selfmask_dist.runs.preempt import Preempted, StopRequest

_BUFFERS, _BEST = "buffers/", "best/"


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
    """A state that is kept beside the present one: parts of tensors, and a dict for JSON."""

    def parts(self) -> list[TensorPart]: ...
    def values(self) -> dict[str, Any]: ...
    def load(self, source: StateSource, values: dict[str, Any]) -> None: ...


class RunState:
    """This process's parts of a run's state. Collective: every rank must make one.

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
        self._buffers: dict[tuple[str, int], Tensor] = {}  # as they began; what stays so is not saved
        if not objective.buffers_all_change:
            self._buffers = {
                (part.name, part.start): part.tensor.clone() for part in buffer_parts(objective, engine.world)
            }

    def parts(self) -> list[TensorPart]:
        """Return this process's parts of the state as it stands; most share its storage. Collective."""
        found = self._engine.parts() + self._moved_buffers()
        if self._best is not None:
            found += [replace(part, name=f"{_BEST}{part.name}") for part in self._best.parts()]
        return found

    def values(
        self, position: Position, *, telemetry: RunningMeans, metrics: dict[str, Any]
    ) -> dict[str, Any]:
        """Return what of the state is no tensor. Collective: every rank must call."""
        values = {
            "position": asdict(position),
            "identity": self._identity,
            "telemetry": telemetry.state(),
            "metrics": metrics,
            "data": self._data.state_dict() if self._data is not None else None,
        }
        return values | ({"best": self._best.values()} if self._best is not None else {})

    def _moved_buffers(self) -> list[TensorPart]:
        """Return the parts of buffers that are not as they began, on some rank."""
        world = self._engine.world
        parts = buffer_parts(self._objective, world)
        if not self._buffers or not parts:
            return parts
        has_moved = torch.tensor(
            [not torch.equal(part.tensor, self._buffers[part.name, part.start]) for part in parts],
            dtype=torch.float32,
            device=world.device,
        )
        flags = world.sum(has_moved).tolist()
        moved = {part.name for part, flag in zip(parts, flags, strict=True) if flag}
        return [part for part in parts if part.name in moved]

    def check(self, checkpoint: OpenCheckpoint) -> None:
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
    def restore(self, checkpoint: OpenCheckpoint, *, telemetry: RunningMeans) -> Position:
        """Read a state into its places and return where to go on. Collective: every rank must call.

        Each process reads the elements that it holds, and nothing of the checkpoint stays in memory.

        Raises:
            ValueError: it is another run's.
            DamagedCheckpointError: it turned out to be damaged, and engine and objective hold some of it:
                they must not be used any more.
        """
        self.check(checkpoint)
        position = Position(**checkpoint.values["position"])
        self._engine.load(checkpoint, step=position.step)
        load_buffers(self._objective, checkpoint, self._buffers)
        telemetry.load_state(checkpoint.values["telemetry"])
        if self._best is not None and "best" in checkpoint.values:
            self._best.load(_Below(checkpoint, _BEST), checkpoint.values["best"])
        checkpoint.confirm()
        return position


class _Below:
    """The tensors of a source whose names begin with `prefix`, without it."""

    def __init__(self, source: StateSource, prefix: str) -> None:
        self._source = source
        self._prefix = prefix
        names = [name for name in source.shapes if name.startswith(prefix)]
        self.shapes = {name.removeprefix(prefix): source.shapes[name] for name in names}
        self.dtypes = {name.removeprefix(prefix): source.dtypes[name] for name in names}

    def read_into(self, part: TensorPart) -> None:
        self._source.read_into(replace(part, name=f"{self._prefix}{part.name}"))


def buffer_parts(objective: Objective, world: World) -> list[TensorPart]:
    """Return this process's parts of an objective's buffers, as buffers/name. Collective."""
    return [
        TensorPart(
            f"{_BUFFERS}{part.name}",
            part.shape,
            part.tensor.detach(),
            part.start,
            copies=world.size if part.is_on_all else 1,
            copy=world.rank if part.is_on_all else 0,
        )
        for part in objective.buffer_parts()
    ]


@torch.no_grad()
def load_buffers(
    objective: Objective, source: StateSource, first: Mapping[tuple[str, int], Tensor] | None = None
) -> None:
    """Read this process's parts of an objective's buffers, and put them in place. Collective.

    Args:
        first: the values, by name and place, of buffers that the source does not have.
    """
    parts = []
    for part in objective.buffer_parts():
        name = f"{_BUFFERS}{part.name}"
        if name not in source.shapes:
            part.tensor.copy_((first or {})[name, part.start])
        else:
            # in the source's dtype, which an objective's beginning may have changed
            values = part.tensor.detach().to(source.dtypes[name])
            source.read_into(TensorPart(name, part.shape, values, part.start))
            part = replace(part, tensor=values)
        parts.append(part)
    objective.take_buffers(parts)


class CheckpointSchedule:
    """Saves by time and by steps, and stops the run when asked to.

    Args:
        saver: every rank has one, and saves with the others.
        every_steps, every_seconds: 0 for never.
        is_asynchronous: write in the background; what is copied first stalls training.

    `stalled` counts the seconds that saving kept training waiting.
    """

    def __init__(
        self,
        state: RunState,
        stop: StopRequest,
        *,
        saver: Saver,
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
            self._saver.is_main
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
        if stop or not self._is_asynchronous:
            self._saver.finish()
        if stop:
            raise Preempted

    def save_again(self, position: Position, telemetry: RunningMeans) -> None:
        """Save the state as it stands, whatever was saved at this step before. Collective."""
        self._save(position, telemetry)

    def finish(self) -> None:
        """Wait for what is being written."""
        self._saver.finish()

    def close(self) -> None:
        """Wait for what is being written, and give back the memory that states are copied to."""
        self._saver.close()

    def _save(self, position: Position, telemetry: RunningMeans) -> None:
        start = time.perf_counter()
        self._saver.finish()  # parts are copied to where the one before is written from
        values = self._state.values(position, telemetry=telemetry, metrics=self.metrics)
        self._saver.save(self._state.parts(), values, step=position.step)
        self._last_time, self._last_step = time.monotonic(), position.step
        self.stalled += time.perf_counter() - start
