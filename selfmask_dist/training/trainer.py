"""The training loop: batches in, masks (or weights) trained, numbers out.

    for each batch:  set the learning rate -> gradients -> is the loss finite, is it time to save or to stop?
                     -> step -> log -> monitor -> save

Knows nothing of objectives, k-NN, SLURM or how masks are laid out: the engine makes the step, `telemetry` and
`monitor` are callables that return numbers.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from selfmask_dist.common.text import duration
from selfmask_dist.data import Batch, Quarantine
from selfmask_dist.parallel import Engine
from selfmask_dist.runs.metrics import MetricsWriter
from selfmask_dist.runs.preempt import Preempted
from selfmask_dist.runs.speed.profile import StepProfiler, part
from selfmask_dist.training.meter import Meter, NonFiniteError
from selfmask_dist.training.schedule import Schedule
from selfmask_dist.training.state import CheckpointSchedule, Position


class Batches(Protocol):
    """The batches of one epoch on this rank."""

    def __iter__(self) -> Iterator[Batch]: ...
    def __len__(self) -> int: ...


class StepTelemetry(Protocol):
    """Numbers about what is trained, around a step that is logged."""

    def before_step(self) -> None: ...
    def after_step(self) -> dict[str, Any]: ...


@dataclass
class Trainer:
    """One training run of `num_steps` steps over `epoch_batches(0, 0), epoch_batches(1, 0), ...`.

    Args:
        epoch_batches: (epoch, first) -> the batches of an epoch from number `first` on.
        checkpoints: saves checkpoints and stops the run; None for neither.
        monitor: (step) -> numbers, called every `monitor_every` steps (0: never). Collective: every rank
            calls it.
        directory: where a failure leaves what is needed to look at it.
        before_step: (step), called before its forward. after_step: after its update. Collective.
        has_ended: whether what was measured says to train no further; the same on every rank.
        remarks: (numbers of a logged step) -> what the user should know about them.
        sample_key: sample id -> key, for messages.
        profiler: traces some of the steps.
        quarantine: counts this rank's unreadable samples, and judges the sum over ranks.
    """

    engine: Engine
    optimizer: Optimizer
    schedule: Schedule
    num_steps: int
    epoch_batches: Callable[[int, int], Batches]
    writer: MetricsWriter
    directory: Path
    telemetry: StepTelemetry | None = None
    monitor: Callable[[int], dict[str, Any]] | None = None
    monitor_every: int = 0
    log_every: int = 10
    sample_key: Callable[[int], str] = str
    checkpoints: CheckpointSchedule | None = None
    before_step: Callable[[int], None] = lambda step: None
    after_step: Callable[[], None] = lambda: None
    on_step: Callable[[], None] = lambda: None
    has_ended: Callable[[], bool] = lambda: False
    remarks: Callable[[dict[str, Any]], list[str]] = lambda values: []
    quarantine: Quarantine | None = None
    profiler: StepProfiler | None = None

    def run(self, start: Position | None = None, meter: Meter | None = None) -> int:
        """Train to the end and return the number of steps made. Collective: every rank must call.

        Args:
            start: where a restored run stands; `meter` is restored with it.

        Raises:
            NonFiniteError: the loss is NaN or infinite.
            Preempted: a rank was asked to stop; the checkpoints has saved.
            QuarantineError: more samples than the budget allows could not be read.
        """
        start, meter = start or Position(), meter or Meter(self.engine.world)
        try:
            with meter.watching(self.engine.module):
                return self._run(start, meter)
        finally:
            if self.profiler is not None:  # stopped, or at its end, within the steps that are traced
                self.profiler.close()

    def _run(self, start: Position, meter: Meter) -> int:
        step, epoch, done = start.step, start.epoch, start.batch
        self.writer.start_progress(self.num_steps, step)
        if not start.is_measured:
            self._run_monitor(step, meter)
        while step < self.num_steps and not self.has_ended():
            for batch in meter.time_waiting(self.epoch_batches(epoch, done)):
                is_logged = (step + 1) % self.log_every == 0 or step + 1 == self.num_steps
                metrics, stop, save = self._step(step, epoch, batch, is_logged=is_logged)
                step, done = step + 1, done + 1
                meter.add(metrics, batch)
                self.on_step()
                self.writer.advance()
                if is_logged:
                    self._log(step, epoch, meter)
                self._after_step(Position(step, epoch, done), meter, stop=stop, save=save)
                if step == self.num_steps or self.has_ended():
                    break
            self._check_quarantine()
            epoch, done = epoch + 1, 0
        self.writer.end_progress()
        return step

    def _step(
        self, step: int, epoch: int, batch: Batch, *, is_logged: bool
    ) -> tuple[dict[str, Tensor], bool, bool]:
        """Make one step; return its metrics, and whether to stop and to save after it."""
        if self.profiler is not None:
            self.profiler.before_step(step)
        self.schedule.apply(self.optimizer, step)
        self.before_step(step)
        with part("gradients"):
            metrics = self.engine.forward_backward(batch)
        with part("loss and votes"):
            stop, save = self._agree(metrics["loss"], step, epoch, batch)
        if is_logged and self.telemetry is not None:
            self.telemetry.before_step()
        with part("step"):
            self.engine.step()
        with part("objective"):
            self.after_step()
        if self.profiler is not None:
            self.profiler.after_step(step)
        return metrics, stop, save

    def _after_step(self, position: Position, meter: Meter, *, stop: bool, save: bool) -> None:
        """Monitor and save where it is time to; a stop in between leaves the monitor for later."""
        step = position.step
        if self.monitor is not None and self.monitor_every and step % self.monitor_every == 0:
            position = replace(position, is_measured=False)
            if not stop:
                try:
                    self._run_monitor(step, meter)
                    position = replace(position, is_measured=True)
                except Preempted:
                    stop = True
        if self.checkpoints is not None:
            is_last = step == self.num_steps or self.has_ended()
            self.checkpoints.after_step(position, meter, stop=stop, due=save, is_last=is_last)

    def _log(self, step: int, epoch: int, meter: Meter) -> None:
        values: dict[str, Any] = {"epoch": epoch, **meter.read()}
        if (broken := self._check_quarantine()) > 0:
            values["quarantined"] = broken
        for group in self.optimizer.param_groups:
            values[f"lr/{group['name']}"] = group["lr"]
        if self.telemetry is not None:
            values |= self.telemetry.after_step()
        remaining = (self.num_steps - step) * meter.seconds_per_step
        self.writer.newest["ranks"] = meter.ranks
        self.writer.scalars(step, values)
        for text in self.remarks(values):
            self.writer.event("remark", step=step, text=text)
            self.writer.message(f"step {step}: {text}")
        self.writer.status(
            f"step {step}/{self.num_steps}  loss {values['loss']:.4f}  "
            f"{values['images_per_second']:.0f} images/s  data wait {values['data_wait']:.0%}  "
            f"ETA {duration(remaining)}"
        )

    def _check_quarantine(self) -> int:
        """Return the samples that failed in this epoch on all ranks. Collective: every rank must call."""
        if self.quarantine is None:
            return 0
        world = self.engine.world
        total = int(world.sum(torch.tensor(self.quarantine.failed, device=world.device)).item())
        self.quarantine.check(total)
        return total

    def _run_monitor(self, step: int, meter: Meter) -> None:
        assert self.monitor is not None
        values = self.monitor(step)
        self.writer.scalars(step, values)
        if self.checkpoints is not None:
            self.checkpoints.metrics = values
        numbers = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        self.writer.message(f"step {step}: {numbers}")
        meter.restart_clock()  # evaluation is not training time

    def _agree(self, loss: Tensor, step: int, epoch: int, batch: Batch) -> tuple[bool, bool]:
        """Return whether some rank wants to stop, and whether it is time to save. Checks the loss too."""
        votes = self.checkpoints.votes() if self.checkpoints is not None else (0.0, 0.0)
        values = torch.tensor([0.0, *votes], dtype=torch.float64, device=loss.device)
        values[0] = loss.detach()
        # one device sync a step on a GPU, before the optimizer moves anything: the scores stay those that
        # gave the loss. All ranks see the same sum, so they stop together
        total, stop, save = self.engine.world.sum(values).tolist()
        if not math.isfinite(total):
            self._fail(loss.item(), step, epoch, batch)
        return stop > 0, save > 0

    def _fail(self, value: float, step: int, epoch: int, batch: Batch) -> None:
        rank = self.engine.world.rank
        if math.isfinite(value):
            raise NonFiniteError(f"the loss is not finite on another rank at step {step} (epoch {epoch})")
        path = self.directory / f"failure-step{step}-rank{rank}.pt"
        torch.save(
            {"step": step, "epoch": epoch, "views": batch.views, "labels": batch.labels, "ids": batch.ids},
            path,
        )
        keys = [self.sample_key(int(i)) for i in batch.ids[batch.weights > 0]]
        raise NonFiniteError(
            f"the loss is {value} at step {step} (epoch {epoch}) on rank {rank}, in the batch of samples "
            f"{', '.join(keys[:4])}, ... ({len(keys)} on this rank). No weight was changed by it. The batch "
            f"is saved in "
            f"{path} (torch.load). Usual causes: a learning rate that is too high (optim.score_lr, "
            f"optim.head_lr), "
            f"objective.head_norm=none on raw ViT features, or broken images"
        )
