"""The training loop: batches in, masks (or weights) trained, numbers out.

    for each batch:  set the learning rate -> gradients -> is the loss finite? -> step -> log

Knows nothing of objectives, k-NN, SLURM or how masks are laid out: the engine makes the step, `telemetry` and
`monitor` are callables that return numbers.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from selfmask_dist.data import Batch, Quarantine
from selfmask_dist.metrics import MetricsWriter
from selfmask_dist.parallel import Engine
from selfmask_dist.schedule import Schedule


class NonFiniteError(ArithmeticError):
    """The loss or the scores stopped being finite; the message names step and batch, and what was saved."""


class Batches(Protocol):
    """The batches of one epoch on this rank."""

    def __iter__(self) -> Iterator[Batch]: ...
    def __len__(self) -> int: ...


class Telemetry(Protocol):
    """Numbers about what is trained, around a step that is logged."""

    def before_step(self) -> None: ...
    def after_step(self) -> dict[str, Any]: ...


@dataclass
class Trainer:
    """One training run of `num_steps` steps over `epoch_batches(0), epoch_batches(1), ...`.

    Args:
        epoch_batches: the batches of an epoch.
        monitor: (step) -> numbers, called every `monitor_every` steps (0: never). Collective: every rank
            calls it.
        directory: where a failure leaves what is needed to look at it.
        sample_key: sample id -> key, for messages.
        quarantine: counts this rank's unreadable samples, and judges the sum over ranks.
    """

    engine: Engine
    optimizer: Optimizer
    schedule: Schedule
    num_steps: int
    epoch_batches: Callable[[int], Batches]
    writer: MetricsWriter
    directory: Path
    telemetry: Telemetry | None = None
    monitor: Callable[[int], dict[str, Any]] | None = None
    monitor_every: int = 0
    log_every: int = 10
    sample_key: Callable[[int], str] = str
    quarantine: Quarantine | None = None

    def run(self) -> int:
        """Train to the end; returns the number of steps. Collective: every rank must call.

        Raises:
            NonFiniteError: the loss is NaN or infinite.
            QuarantineError: more samples than the budget allows could not be read.
        """
        step, epoch = 0, 0
        meter = Meter(self.engine)
        self.writer.start_progress(self.num_steps)
        while step < self.num_steps:
            for batch in meter.time_waiting(self.epoch_batches(epoch)):
                self.schedule.apply(self.optimizer, step)
                is_logged = (step + 1) % self.log_every == 0 or step + 1 == self.num_steps
                metrics = self.engine.forward_backward(batch)
                self._check_finite(metrics["loss"], step, epoch, batch)
                if is_logged and self.telemetry is not None:
                    self.telemetry.before_step()
                self.engine.step()
                step += 1
                meter.add(metrics, batch)
                self.writer.advance()
                if is_logged:
                    self._log(step, epoch, meter)
                if self.monitor is not None and self.monitor_every and step % self.monitor_every == 0:
                    self._run_monitor(step, meter)
                if step == self.num_steps:
                    break
            self._check_quarantine()
            epoch += 1
        self.writer.end_progress()
        return step

    def _log(self, step: int, epoch: int, meter: "Meter") -> None:
        values: dict[str, Any] = {"epoch": epoch, **meter.read()}
        if (broken := self._check_quarantine()) > 0:
            values["quarantined"] = broken
        for group in self.optimizer.param_groups:
            values[f"lr/{group['name']}"] = group["lr"]
        if self.telemetry is not None:
            values |= self.telemetry.after_step()
        remaining = (self.num_steps - step) * meter.seconds_per_step
        self.writer.scalars(step, values)
        self.writer.status(
            f"step {step}/{self.num_steps}  loss {values['loss']:.4f}  "
            f"{values['images_per_second']:.0f} images/s  data wait {values['data_wait']:.0%}  "
            f"ETA {_duration(remaining)}"
        )

    def _check_quarantine(self) -> int:
        """Samples that failed in this epoch on all ranks. Collective: every rank must call."""
        if self.quarantine is None:
            return 0
        world = self.engine.world
        total = int(world.sum(torch.tensor(self.quarantine.failed, device=world.device)).item())
        self.quarantine.check(total)
        return total

    def _run_monitor(self, step: int, meter: "Meter") -> None:
        assert self.monitor is not None
        values = self.monitor(step)
        self.writer.scalars(step, values)
        numbers = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        self.writer.message(f"step {step}: {numbers}")
        meter.restart_clock()  # evaluation is not training time

    def _check_finite(self, loss: Tensor, step: int, epoch: int, batch: Batch) -> None:
        # one device sync a step on a GPU, before the optimizer moves anything: the scores stay those that
        # gave the loss
        if math.isfinite(value := loss.item()):
            return
        rank = self.engine.world.rank
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


class Meter:
    """Running means since the last read, images per second, and the share of time spent waiting for data."""

    def __init__(self, engine: Engine) -> None:
        self._world = engine.world
        self.seconds_per_step = 0.0
        self._reset()

    def time_waiting(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Pass batches on, timing how long each kept the loop waiting."""
        iterator = iter(batches)
        while True:
            start = time.perf_counter()
            batch = next(iterator, None)
            self._waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def add(self, metrics: dict[str, Tensor], batch: Batch) -> None:
        for name, value in metrics.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._steps += 1
        self._images += batch.global_count

    def read(self) -> dict[str, float]:
        """Means over the steps since the last read, summed over ranks. Collective; one device sync."""
        totals = self._world.sum(torch.stack([value.double() for value in self._sums.values()]))
        values = {name: total / self._steps for name, total in zip(self._sums, totals.tolist(), strict=True)}
        elapsed = max(time.perf_counter() - self._start, 1e-9)
        values["images_per_second"] = self._images / elapsed
        values["data_wait"] = min(self._waited / elapsed, 1.0)
        self.seconds_per_step = elapsed / self._steps
        self._reset()
        return values

    def restart_clock(self) -> None:
        """Forget the time since the last read, and what was counted in it."""
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps = self._images = 0
        self._waited = 0.0
        self._start = time.perf_counter()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
