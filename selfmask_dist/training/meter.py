"""Numbers of a training run between two log lines: running means, images per second, waiting for data,
memory; and how the masks move.

What a `Meter` counted is part of a run's state.
"""

import resource
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from selfmask_dist.data import Batch
from selfmask_dist.maskfile.api import Masks
from selfmask_dist.masking import measure
from selfmask_dist.parallel import World


class NonFiniteError(ArithmeticError):
    """The loss or the scores stopped being finite; the message names step and batch, and what was saved."""


class Meter:
    """Running means since the last read, images per second, and the share of time spent waiting for data."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._sums: dict[str, Tensor] = {}
        self.seconds_per_step = 0.0
        # of each rank, seconds a step and the peak of memory: what `stragglers` and `memory_of_ranks` look at
        self.ranks: dict[str, list[float]] = {}
        self._forward = ForwardClock(world.device)
        self._reset()

    @contextmanager
    def watching(self, module: nn.Module) -> Iterator[None]:
        """Time the forward passes of a module inside of `with`."""
        handles = self._forward.watch(module)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

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
        """Count a step: this rank's share of each metric, and the images of the global batch."""
        for name, value in metrics.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._steps += 1
        self._images += batch.global_count

    def read(self) -> dict[str, float]:
        """Return means over the steps since the last read, summed over ranks. Collective; one device sync."""
        totals = torch.stack([value.double() for value in self._sums.values()])
        totals, ranks = self._world.sum(torch.cat([totals, self._own_numbers(totals)])).split(
            [len(totals), 3 * self._world.size]
        )
        values = {name: total / self._steps for name, total in zip(self._sums, totals.tolist(), strict=True)}
        forward, waited, memory = ranks.view(3, -1).tolist()
        self.ranks = {"forward": forward, "data": waited, "memory_mib": memory}
        elapsed = max(time.perf_counter() - self._start, 1e-9)
        values["images_per_second"] = self._images / elapsed
        values["data_wait"] = min(self._waited / elapsed, 1.0)
        values["memory_mib"] = max(memory)
        self.seconds_per_step = elapsed / self._steps
        self._reset()
        return values

    def _own_numbers(self, like: Tensor) -> Tensor:
        """Return (3 * ranks): of this rank the seconds a step of forward passes and of waiting for data, and
        the peak of memory in MiB; 0 for the others.

        They ride on the sum of the metrics: no collective of their own.
        """
        rows = torch.zeros(3, self._world.size, dtype=torch.float64)
        steps, memory = max(self._steps, 1), peak_memory(self._world.device) / 2**20
        rows[:, self._world.rank] = torch.tensor(
            [self._forward.read() / steps, self._waited / steps, memory], dtype=torch.float64
        )
        return rows.flatten().to(like.device)

    def state(self) -> dict[str, Any]:
        """Return what was counted since the last read, rank by rank. Collective: every rank must call."""
        rows = torch.zeros(self._world.size, len(self._sums), dtype=torch.float64)
        if self._sums:
            rows[self._world.rank] = torch.stack([value.double().cpu() for value in self._sums.values()])
        rows = self._world.sum(rows.to(self._world.device)).cpu()
        return {
            "names": list(self._sums),
            "dtypes": [str(value.dtype).removeprefix("torch.") for value in self._sums.values()],
            "ranks": rows.tolist(),
            "steps": self._steps,
            "images": self._images,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on counting; with another number of ranks the first one takes all."""
        rows = torch.tensor(state["ranks"], dtype=torch.float64, device=self._world.device)
        if len(rows) == self._world.size:
            mine = rows[self._world.rank]
        else:
            mine = rows.sum(0) if self._world.is_main else torch.zeros_like(rows[0])
        self._sums = {
            name: value.to(getattr(torch, dtype))
            for name, dtype, value in zip(state["names"], state["dtypes"], mine, strict=True)
        }
        self._steps, self._images = state["steps"], state["images"]

    def restart_clock(self) -> None:
        """Forget the time since the last read, and what was counted in it."""
        self._reset()

    def _reset(self) -> None:
        self._forward.read()
        self._sums = {}
        self._steps = self._images = 0
        self._waited = 0.0
        self._start = time.perf_counter()


class ForwardClock:
    """Seconds that a module's training forward passes took on this rank, on its device.

    The one part of a step in which a rank (under ddp) waits for no other: whole steps take equally long on
    all of them, as each waits for the slowest.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._begun: Any = None
        self._spans: list[tuple[Any, Any]] = []

    def watch(self, module: nn.Module) -> list[RemovableHandle]:
        """Time every forward pass of the module, until the handles that are returned are removed."""
        return [module.register_forward_pre_hook(self._begin), module.register_forward_hook(self._end)]

    def read(self) -> float:
        """Return the seconds since the last read. On a GPU this waits for the last of these passes."""
        spans, self._spans = self._spans, []
        if not self._is_cuda:
            return sum(end - begin for begin, end in spans)
        if spans:
            spans[-1][1].synchronize()
        return sum(begin.elapsed_time(end) for begin, end in spans) / 1000

    def _begin(self, _module: nn.Module, _inputs: Any) -> None:
        self._begun = self._now() if torch.is_grad_enabled() else None

    def _end(self, _module: nn.Module, _inputs: Any, _output: Any) -> None:
        if self._begun is not None:
            self._spans.append((self._begun, self._now()))
            self._begun = None

    def _now(self) -> Any:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process has held so far: of its GPU's memory, or else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


class MaskTelemetry:
    """Active share, flips and near-threshold mass at a logged step; stops a run whose scores are not
    finite.
    """

    def __init__(self, masks: Masks) -> None:
        self._masks = masks
        self._before: dict[str, Tensor] | None = None

    def before_step(self) -> None:
        """Keep the mask as it is, to count flips."""
        self._before = self._masks.mask_pieces()

    def after_step(self) -> dict[str, Any]:
        """Return the numbers of the step by name; raises NonFiniteError where a score is not finite."""
        statistics = measure(self._masks, before=self._before)
        if statistics.num_nonfinite:
            raise NonFiniteError(
                f"{statistics.num_nonfinite} scores are not finite: a gradient overflowed since the last "
                f"log. Lower "
                f"optim.score_lr or set optim.clip_norm"
            )
        return {
            "mask/active": statistics.active,
            "mask/flips": statistics.flips,
            "mask/near_threshold": statistics.near_threshold,
            "mask/empty": list(statistics.empty),
            "mask/active_by_parameter": statistics.active_by_parameter,
        }
