"""Random ranks are killed (SIGKILL) or told to stop (SIGUSR2, SIGTERM) at random; masks stay bit-identical.

Runs of two local nodes. Each signal aims at start-up, training, saving or evaluation; now and then a second
one follows while the first is still acted on. Every run must end by itself with the masks and the losses,
step by step, of the run that nobody disturbed.

    python benchmarks/faults/chaos.py [--kills 100] [--quick] --json
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness import Benchmark
from tests.support.tiny_run import (
    child_environment,
    processes_of,
    submit,
    submit_command,
    write_config,
    write_tiny_data,
)

_NUM_NODES = 2
_SIGNALS = (signal.SIGKILL, signal.SIGUSR2, signal.SIGTERM)
_PHASES = ("start-up", "training", "saving", "evaluation")
_KILLS_PER_RUN = 5
_MONITOR_STEPS = 8  # every two epochs of four steps
_DOUBLE_SHARE = 0.2
_END_SECONDS = 120.0  # for the processes to end once one was signalled


def newest_line(run: Path) -> dict[str, Any]:
    """The last whole line of `metrics.jsonl`."""
    with contextlib.suppress(OSError):
        with open(run / "metrics.jsonl", "rb") as stream:
            stream.seek(max(os.fstat(stream.fileno()).st_size - 16384, 0))
            lines = stream.read().split(b"\n")[1:-1]
        if lines:
            found: dict[str, Any] = json.loads(lines[-1])
            return found
    return {}


def phase_of(run: Path, since: float) -> str:
    """What a run that was started (again) at `since` is doing, from its files."""
    if any((run / "checkpoints").glob(".step-*.partial")):
        return "saving"
    newest = newest_line(run)
    if newest.get("time", 0.0) < since:
        return "start-up"
    return "evaluation" if "loss" in newest and newest["step"] % _MONITOR_STEPS == 0 else "training"


def ranks_of(folder: Path, name: str) -> dict[int, int]:
    """The living training processes of run `name`: rank -> process id."""
    found = {}
    for pid, command in processes_of(folder).items():
        if "selfmask_dist.cli" in command and f"run.name={name}" in command:
            with contextlib.suppress(OSError):
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                found.update(
                    {rank: pid for rank in range(_NUM_NODES) if f"RANK={rank}".encode() in variables}
                )
    return found


@dataclass
class Storm:
    """Signals to one run. `moments`: how many came in each phase."""

    config: Path
    name: str
    kills: int
    start_seconds: float  # that a start takes, about
    rng: random.Random
    moments: Counter[str] = field(default_factory=Counter)
    _launcher: subprocess.Popen[bytes] = field(init=False)

    @property
    def run_folder(self) -> Path:
        return self.config.parent / self.name

    def run(self) -> int:
        """From the start of the run to its end; returns its exit status."""
        command = submit_command(self.config, f"run.name={self.name}", nodes=_NUM_NODES)
        with subprocess.Popen(command, env=child_environment(), stderr=subprocess.DEVNULL) as self._launcher:
            while self.moments.total() < self.kills and not self._is_over():
                self._strike()
            return self._launcher.wait(600)

    def _strike(self) -> None:
        """One start of the run, from its first moment until the signalled processes are gone."""
        since = time.time()
        self._wait(lambda: len(ranks_of(self.config.parent, self.name)) == _NUM_NODES)
        ranks = ranks_of(self.config.parent, self.name)
        self._aim(self.rng.choice(_PHASES), since)
        if self._is_over():
            return
        self._signal(ranks, since)
        if self.rng.random() < _DOUBLE_SHARE and self.moments.total() < self.kills:
            time.sleep(self.rng.uniform(0.0, 0.3))
            self._signal(ranks, since)
        self._wait(lambda: not set(ranks.values()) & set(processes_of(self.config.parent)))

    def _is_over(self) -> bool:
        return self._launcher.poll() is not None

    def _aim(self, phase: str, since: float) -> None:
        """Wait for a moment of the phase."""
        if phase == "start-up":
            time.sleep(self.rng.uniform(0.0, self.start_seconds))
            return
        self._wait(lambda: newest_line(self.run_folder).get("time", 0.0) > since)
        if phase == "training":
            aim = newest_line(self.run_folder).get("step", 0) + self.rng.randint(1, 12)
            self._wait(lambda: newest_line(self.run_folder).get("step", 0) >= aim)
        else:
            self._wait(lambda: phase_of(self.run_folder, since) == phase)
            if phase == "evaluation":
                time.sleep(self.rng.uniform(0.0, 0.1))

    def _signal(self, ranks: dict[int, int], since: float) -> None:
        phase = phase_of(self.run_folder, since)
        with contextlib.suppress(ProcessLookupError):  # it ended before
            os.kill(ranks[self.rng.randrange(_NUM_NODES)], self.rng.choice(_SIGNALS))
            self.moments[phase] += 1

    def _wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _END_SECONDS
        while not condition() and not self._is_over():
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} stands still; see {self.run_folder / 'logs'}")
            time.sleep(0.003)


def losses_of(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def is_same(run: Path, calm: Path) -> bool:
    """Whether masks and losses equal, bit for bit, those of the run that nobody disturbed."""
    if not (run / "result.json").exists():
        return False
    same_masks = (run / "final.mask").read_bytes() == (calm / "final.mask").read_bytes()
    return same_masks and losses_of(run) == losses_of(calm)


def main() -> int:
    bench = Benchmark("chaos", __doc__)
    bench.parser.add_argument("--kills", type=int, help="100, or 4 with --quick")
    bench.parser.add_argument("--keep", type=Path, help="work in this folder, and leave it (a temporary one)")
    options = bench.parse()
    kills = options.kills or (4 if options.quick else 100)
    rng = random.Random(0)
    survived = runs = ended = 0
    moments: Counter[str] = Counter()
    with contextlib.ExitStack() as stack:
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        config = write_config(
            folder / "tiny.yaml",
            write_tiny_data(folder / "data"),
            optim={"score_lr": 300.0},
            train={"epochs": 40, "global_batch_size": 12},
            eval={"knn_every": 2, "knn_k": [5], "batch_size": 4},
            checkpoint={"every_steps": 5},
        )
        started = time.time()
        calm = submit(config, "run.name=calm", nodes=_NUM_NODES, timeout=600)
        if calm.returncode:
            raise RuntimeError(calm.stderr)
        first_step = json.loads((folder / "calm" / "metrics.jsonl").read_text().splitlines()[0])["time"]
        while moments.total() < kills:
            number = min(_KILLS_PER_RUN, kills - moments.total())
            storm = Storm(config, f"storm-{runs}", number, first_step - started, rng)
            ended += storm.run() == 0
            same = is_same(storm.run_folder, folder / "calm")
            survived += same * storm.moments.total()
            runs, moments = runs + 1, moments + storm.moments
            print(f"{storm.name}: {dict(storm.moments)}, {'same' if same else 'DIFFERENT'}", file=sys.stderr)
    bench.figure("signals", moments.total(), min=kills)
    bench.figure("signals_after_which_masks_and_losses_are_bit_identical", survived, min=kills)
    for phase in _PHASES:
        bench.figure(f"signals_in_{phase.replace('-', '_')}", moments[phase], min=1, quick=False)
    bench.figure("runs", runs)
    bench.figure("runs_that_ended_by_themselves", ended, min=runs)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
