"""A run is preempted at random moments, requeues itself, and its masks equal those of the uninterrupted run.

The command is that of the README, `python launchers/submit.py --nodes N --config FILE`. On `slurm` a job of a
higher partition takes the nodes (a SLURM of four virtual nodes is started here where none is up; needs root);
on `local` a random rank gets SIGUSR2 and the launcher starts the run again.

    python benchmarks/faults/preemption.py [--cluster slurm] [--nodes 4] [--preemptions 3] [--quick] --json
"""

import os
import random
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from benchmarks.harness import Benchmark
from tests.support import slurm
from tests.support.tiny_run import (
    child_environment,
    events_of,
    rank_process,
    steps_of,
    submit,
    submit_command,
    wait_until,
    write_config,
    write_tiny_data,
)


def preempt_on_slurm(config: Path, run: Path, args: list[str], nodes: int, moments: list[int]) -> None:
    done = submit(config, *args, "launch.exclusive=true", nodes=nodes, cluster="slurm")
    if done.returncode:
        raise RuntimeError(done.stderr)
    job = slurm.submitted_job(done.stdout)
    for number, moment in enumerate(moments):
        wait_until(partial(_is_at, run, number + 1, moment), 300)
        slurm.preempt(job)
    slurm.wait_for_end(job)


def preempt_here(config: Path, run: Path, args: list[str], nodes: int, moments: list[int]) -> None:
    command = submit_command(config, *args, nodes=nodes)
    rng = random.Random(0)
    with subprocess.Popen(command, env=child_environment(), stderr=subprocess.DEVNULL):
        for number, moment in enumerate(moments):
            wait_until(partial(_is_at, run, number + 1, moment), 300)
            os.kill(rank_process(config.parent, rng.randrange(nodes), run.name), 12)


def _is_at(run: Path, start: int, step: int) -> bool:
    """Whether start number `start` has come as far as `step`."""
    starts = sum(event["event"] == "start" for event in events_of(run))
    return starts >= start and max(steps_of(run), default=0) >= step


def repeated_steps(run: Path) -> int:
    """Steps done beyond what the next start resumed from: work that was lost and done again."""
    lost, done = 0, 0
    for event in events_of(run):
        if event["event"] == "preempted":
            done = event["step"] or 0
        if event["event"] == "resume":
            lost += done - event["step"]
    return lost


def main() -> int:
    bench = Benchmark("preemption", __doc__)
    bench.parser.add_argument("--cluster", choices=("slurm", "local"), default="slurm")
    bench.parser.add_argument("--nodes", type=int, default=4)
    bench.parser.add_argument("--preemptions", type=int, help="3, or 1 with --quick")
    options = bench.parse()
    count = options.preemptions or (1 if options.quick else 3)
    if options.cluster == "slurm" and (reason := slurm.why_not()):
        bench.skip(reason)
        return bench.finish()
    was_up = slurm.is_up()
    if options.cluster == "slurm":
        os.environ["SLURM_CONF"] = str(slurm.up())
    steps = 60 * (count + 1)
    rng = random.Random(0)
    moments = [60 * index + rng.randint(10, 50) for index in range(count)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_tiny_data(folder / "data")
        optim = {"score_lr": 300.0}
        config = write_config(
            folder / "tiny.yaml", data, optim=optim, train={"epochs": steps / 4, "global_batch_size": 12}
        )
        calm = submit(config, "run.name=calm", nodes=options.nodes, timeout=600)
        if calm.returncode:
            raise RuntimeError(calm.stderr)
        started = time.perf_counter()
        storm = preempt_on_slurm if options.cluster == "slurm" else preempt_here
        storm(config, folder / "stormy", ["run.name=stormy"], options.nodes, moments)
        seconds = time.perf_counter() - started
        run = folder / "stormy"
        finished = (run / "result.json").exists()
        same = finished and (run / "final.mask").read_bytes() == (folder / "calm" / "final.mask").read_bytes()
        preempted = sum(event["event"] == "preempted" for event in events_of(run))
        bench.figure("preemptions", preempted, min=count)
        bench.figure("finished", float(finished), min=1.0)
        bench.figure("masks_bit_identical", float(same), min=1.0)
        bench.figure("steps_needed", steps)
        bench.figure("steps_executed_minus_needed", repeated_steps(run), max=0)
        bench.figure("steps_logged_twice_or_never", len(set(range(1, steps + 1)) ^ set(steps_of(run))), max=0)
        bench.figure("seconds", seconds)
    if options.cluster == "slurm" and not was_up:
        slurm.down()
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
