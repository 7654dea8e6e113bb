"""How long saving keeps training waiting, as a share of wall time.

A ViT-S with masks trains on random images and saves as a run does: the tensors are copied, then written in
the background. Training pays twice: it waits for the copy (`stalled`), and the steps during which a
checkpoint is written may be slower (`slowed`). Both are measured, on one process and on two (gloo):

    share at an interval = (stalled + slowed) of a save / the interval

`default` is that share at checkpoint.every_minutes as it ships. `short` really saves every few seconds: the
seconds of waiting as a share of the wall time, and the share lost to both against steps without saving.

    python -m benchmarks.faults.checkpoint_stall [--quick] --json
"""

import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import timm
import torch

from benchmarks.harness import Benchmark
from selfmask_dist import attach
from selfmask_dist.backbones import find_blocks
from selfmask_dist.config import load_config
from selfmask_dist.config.sections import EngineConfig
from selfmask_dist.data import Batch
from selfmask_dist.objectives import Objective
from selfmask_dist.parallel import build_engine
from selfmask_dist.runs.checkpoint import Retention, Saver, committed, saving_peers
from selfmask_dist.runs.preempt import StopRequest
from selfmask_dist.training.meter import Meter
from selfmask_dist.training.state import CheckpointSchedule, Position, RunState
from tests.support.distributed import run_distributed
from tests.support.engine_cases import CLASSES, Step, world_here

ROWS, IMAGE_SIZE = 8, 32  # of the global batch
SETTINGS = (("ddp", 1), ("ddp", 2), ("fsdp", 2))


class Clock:
    """The trainer's loop on random images, with the time of every step."""

    def __init__(self, engine_name: str, folder: Path, every_seconds: float) -> None:
        world = world_here()
        torch.manual_seed(0)
        encoder = timm.create_model("vit_small_patch16_224", img_size=IMAGE_SIZE, num_classes=0)
        encoder.requires_grad_(False)
        step = Step(encoder, 384, torch.float32, "frozen")
        self.engine = build_engine(
            step,
            encoder=encoder,
            blocks=find_blocks(encoder),
            world=world,
            config=EngineConfig.model_validate({"name": engine_name}),
        )
        masks = self.engine.attach(encoder, attach, include="vit")
        self.engine.start(
            torch.optim.SGD([*masks.parameters(), *step.head.parameters()], lr=1e-3, momentum=0.9)
        )
        self.num_masked = sum(entry.theta.numel() for entry in masks.entries)
        self.saver = Saver(folder, Retention(last=2), peers=saving_peers(world))
        state = RunState(self.engine, Objective(), identity={})
        self.checkpoints = CheckpointSchedule(
            state, StopRequest(), saver=self.saver, every_seconds=every_seconds
        )
        share = slice(world.rank, ROWS, world.size)
        images = torch.randn(ROWS, 3, IMAGE_SIZE, IMAGE_SIZE)[share]
        labels = (torch.arange(ROWS) % CLASSES)[share]
        self.batch = Batch((images,), labels, torch.ones(len(labels)), torch.arange(ROWS)[share], ROWS)
        self.world, self.step, self.meter = world, 0, Meter(world)

    def run_step(self, *, save: bool | None = None) -> tuple[float, float, bool]:
        """One step and, where it is time (or `save`), a checkpoint.

        Returns:
            seconds of the step, seconds that saving kept it waiting, whether one was being written; the main
            rank's, on every rank.
        """
        start, stalled = time.perf_counter(), self.checkpoints.stalled
        busy = self.saver.is_busy
        self.engine.forward_backward(self.batch)
        _, due = self.world.sum(torch.tensor(self.checkpoints.votes(), dtype=torch.float64)).tolist()
        self.engine.step()
        self.step += 1
        self.checkpoints.after_step(
            Position(self.step), self.meter, stop=False, due=bool(due) if save is None else save
        )
        stalled = self.checkpoints.stalled - stalled
        values = [time.perf_counter() - start - stalled, stalled, float(busy)]
        told = torch.tensor(values if self.world.is_main else [0.0] * 3, dtype=torch.float64)
        seconds, stalled, busy = self.world.sum(told).tolist()
        return seconds, stalled, bool(busy)


def measure(engine_name: str, folder: str, saves: int, interval: float, seconds: float) -> dict[str, float]:
    """What single saves cost, then what saving every `interval` seconds costs over `seconds`."""
    clock = Clock(engine_name, Path(folder), interval)
    for _ in range(3):
        clock.run_step(save=False)
    quiet, stalls, slowed, written = [], [], [], []
    for _ in range(saves):
        quiet += [clock.run_step(save=False)[0] for _ in range(4)]
        stalls.append(clock.run_step(save=True)[1])
        started, extra, busy = time.perf_counter(), [], True
        while busy:
            step, _, busy = clock.run_step(save=False)
            extra.append(step)
        written.append(time.perf_counter() - started)
        slowed.append(sum(extra) - len(extra) * median(quiet))
    start, steps, stalled, is_on = time.perf_counter(), 0, 0.0, True
    while is_on:
        stalled += clock.run_step()[1]
        steps += 1
        left = torch.tensor(float(clock.world.is_main and time.perf_counter() - start < seconds))
        is_on = bool(clock.world.sum(left).item())
    wall = time.perf_counter() - start
    clock.checkpoints.finish()
    size = 0
    if clock.world.is_main:
        size = sum(file.stat().st_size for file in committed(Path(folder))[0].iterdir())
    return {
        "step_seconds": median(quiet),
        "stalled_seconds_a_save": median(stalls),
        "slowed_seconds_a_save": median(slowed),
        "written_in_seconds": median(written),
        "short_interval_seconds": interval,
        "short_interval_stalled_share": stalled / wall,
        "short_interval_lost_share": 1 - steps * median(quiet) / wall,
        "bytes_per_masked_weight": size / clock.num_masked,
    }


def main() -> int:
    bench = Benchmark("checkpoint_stall", __doc__)
    options = bench.parse()
    default = load_config(None, []).checkpoint.every_minutes * 60
    bench.figure("default_interval_seconds", default)
    saves, interval, seconds = (2, 3.0, 6.0) if options.quick else (4, 10.0, 30.0)
    for name, world_size in SETTINGS:
        key = f"{name}_{world_size}"
        with tempfile.TemporaryDirectory() as folder:
            arguments = (name, folder, saves, interval, seconds)
            found = run_distributed(measure, world_size, *arguments, timeout=200.0)[0]
        print(key, found, file=sys.stderr, flush=True)
        for figure, value in found.items():
            bench.figure(f"{key}_{figure}", value)
        stalled, slowed = found["stalled_seconds_a_save"], max(found["slowed_seconds_a_save"], 0.0)
        bench.figure(f"{key}_default_stalled_share", stalled / default, max=0.01)
        bench.figure(f"{key}_default_lost_share", (stalled + slowed) / default, max=0.01)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
