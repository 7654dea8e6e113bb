"""A cascade is killed, or told to stop, at random moments of each stage; its file stays bit-identical.

`configs/debug_cascade.yaml` on two local processes. A storm goes through the stages in their order: in each,
a random rank gets SIGKILL, SIGUSR2 or SIGTERM at a random moment, and the launcher starts the run again.
Every run must end by itself with the file of the run that nobody disturbed.

    python benchmarks/faults/cascade_kill.py [--kills 27] [--quick] --json
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.faults.chaos import ranks_of
from benchmarks.harness import Benchmark
from tests.support.cascade_cases import write_shards
from tests.support.tiny_run import ROOT, child_environment, processes_of, submit, submit_command

CONFIG = ROOT / "configs" / "debug_cascade.yaml"
STAGES = (
    "start-up",
    "frozen embeddings",
    "dispatcher",
    "its embeddings",
    "router",
    "experts",
    "their embeddings",
    "combination",
    "evaluation",
)
_NUM_NODES, _NUM_EXPERTS = 2, 2
_SIGNALS = (signal.SIGKILL, signal.SIGUSR2, signal.SIGTERM)
_SECONDS = 120.0  # for anything that is waited for
_MAX_RUNS = 20


def stage_of(run: Path, since: float) -> str:
    """What a cascade that was started (again) at `since` is doing, from its files."""
    stage = STAGES[0]
    for event in _events(run):
        if event["time"] < since:
            continue
        name = event["event"] if event["event"] != "stage" else (event["stage"], event["what"])
        after = {
            "start": "frozen embeddings",
            ("embedded", "frozen"): "dispatcher",
            ("embedded", "dispatcher"): "router",
            "experts": "experts",
            ("embedded", f"expert-{_NUM_EXPERTS - 1}"): "combination",
        }
        stage = "evaluation" if name[0] == "combined" else after.get(name, stage)
    if stage == "dispatcher" and (run / "dispatcher" / "result.json").exists():
        return "its embeddings"
    experts = [run / f"expert-{k}" / "result.json" for k in range(_NUM_EXPERTS)]
    if stage == "experts" and all(path.exists() for path in experts):
        return "their embeddings"
    return stage


def _events(run: Path) -> list[dict[str, Any]]:
    with contextlib.suppress(OSError):
        lines = (run / "events.jsonl").read_text().split("\n")[:-1]
        return [json.loads(line) for line in lines]
    return []


@dataclass
class Storm:
    """One signal in each of `stages`. `moments`: how many came in each, of those that came."""

    folder: Path
    name: str
    settings: list[str]
    seconds: dict[str, float]  # that a stage takes, about
    rng: random.Random
    moments: Counter[str] = field(default_factory=Counter)
    signals: Counter[str] = field(default_factory=Counter)
    _launcher: subprocess.Popen[bytes] = field(init=False)

    @property
    def run_folder(self) -> Path:
        return self.folder / self.name

    def run(self, stages: tuple[str, ...]) -> int:
        """From the start of the run to its end; returns its exit status."""
        command = submit_command(CONFIG, *self.settings, f"run.name={self.name}", nodes=_NUM_NODES)
        with subprocess.Popen(command, env=child_environment(), stderr=subprocess.DEVNULL) as self._launcher:
            for stage in stages:
                self._strike(stage)
            return self._launcher.wait(_SECONDS)

    def _strike(self, wanted: str) -> None:
        """One start of the run, from its first moment until the processes are gone."""
        since = time.time()
        self._wait(lambda: len(ranks_of(self.folder, self.name)) == _NUM_NODES)
        ranks = ranks_of(self.folder, self.name)
        self._wait(lambda: STAGES.index(stage_of(self.run_folder, since)) >= STAGES.index(wanted))
        time.sleep(self.rng.uniform(0.0, 0.8 * self.seconds[wanted]))
        if self._launcher.poll() is not None:
            return
        stage, number = stage_of(self.run_folder, since), self.rng.choice(_SIGNALS)
        with contextlib.suppress(ProcessLookupError):  # it ended before
            os.kill(ranks[self.rng.randrange(_NUM_NODES)], number)
            if stage_of(self.run_folder, since) == stage:  # else nobody knows in which of the two it came
                self.moments[stage] += 1
                self.signals[number.name] += 1
        self._wait(lambda: not set(ranks.values()) & set(processes_of(self.folder)))

    def _wait(self, condition: Any) -> None:
        deadline = time.monotonic() + _SECONDS
        while not condition() and self._launcher.poll() is None:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} stands still; see {self.run_folder / 'logs'}")
            time.sleep(0.003)


def stage_seconds(run: Path, started: float) -> dict[str, float]:
    """How long each stage of a finished run took, by the times of its events and files."""
    at = {(event["event"], event.get("stage"), event.get("what")): event["time"] for event in _events(run)}
    embedded = [at["stage", "embedded", view] for view in ("frozen", "dispatcher", "expert-0", "expert-1")]
    trained = (run / "dispatcher" / "result.json").stat().st_mtime
    experts = max((run / f"expert-{k}" / "result.json").stat().st_mtime for k in range(_NUM_EXPERTS))
    planned = next(time for (event, _, _), time in at.items() if event == "experts")
    combined = next(time for (_, stage, _), time in at.items() if stage == "combined")
    begun = at["start", None, None]
    moments = [started, begun, embedded[0], trained, embedded[1], planned, experts, embedded[3], combined]
    moments.append((run / "result.json").stat().st_mtime)
    return {stage: moments[i + 1] - moments[i] for i, stage in enumerate(STAGES)}


def main() -> int:
    bench = Benchmark("cascade_kill", __doc__)
    bench.parser.add_argument("--kills", type=int, help="at least so many (27, or 3 with --quick)")
    options = bench.parse()
    kills = options.kills or (3 if options.quick else 27)
    rng = random.Random(0)
    moments: Counter[str] = Counter()
    signals: Counter[str] = Counter()
    runs = ended = survived = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = write_shards(folder, train=480, test=160)
        settings = [f"data.train={shards / 'train'}", f"data.test={shards / 'test'}", f"run.dir={folder}"]
        settings += ["run.progress=false", "checkpoint.every_steps=10", "launch.max_restarts=1000"]
        settings += [f"cascade.expert_groups={_NUM_EXPERTS}"]
        started = time.time()
        calm = submit(CONFIG, *settings, "run.name=calm", nodes=_NUM_NODES, timeout=600)
        if calm.returncode:
            raise RuntimeError(calm.stderr)
        expected = (folder / "calm" / "cascade.mask").read_bytes()
        seconds = stage_seconds(folder / "calm", started)
        while runs < _MAX_RUNS:
            rare = [stage for stage in STAGES if moments[stage] < 2 and not options.quick]
            if moments.total() >= kills and not rare:
                break
            stages = rng.sample(STAGES, k=3) if options.quick else STAGES
            if moments.total() >= kills:
                stages = rare  # short ones, that signals have missed
            storm = Storm(folder, f"storm-{runs}", settings, seconds, rng)
            ended += storm.run(tuple(sorted(stages, key=STAGES.index))) == 0
            bundle = storm.run_folder / "cascade.mask"
            same = (storm.run_folder / "result.json").exists() and bundle.read_bytes() == expected
            survived += same * storm.moments.total()
            runs, moments, signals = runs + 1, moments + storm.moments, signals + storm.signals
            print(f"{storm.name}: {dict(storm.moments)}, {'same' if same else 'DIFFERENT'}", file=sys.stderr)
    bench.figure("signals", moments.total(), min=kills)
    bench.figure("signals_after_which_the_file_is_bit_identical", survived, min=moments.total())
    for stage in STAGES:
        bench.figure(
            f"signals_in_{stage.replace(' ', '_').replace('-', '_')}", moments[stage], min=2, quick=False
        )
    bench.figure("by_signal", dict(signals))
    bench.figure("runs", runs)
    bench.figure("runs_that_ended_by_themselves", ended, min=runs)
    bench.figure("seconds_of_a_stage", {stage: round(value, 2) for stage, value in seconds.items()})
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
