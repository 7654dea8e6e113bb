"""What nobody announces, on SLURM: a process hangs or is killed, a data worker is killed, a node fails.

Each run is the README's command on a real SLURM of four virtual nodes (started here where none is up; needs
root), hit once in the middle. It must be requeued by itself, finish, and have the masks of the run that
nobody disturbed, bit for bit.

    hang    SIGSTOP to a rank; noticed after checkpoint.hang_minutes, all ranks' stacks dumped
    kill    SIGKILL to a rank, as the kernel does where memory ends
    worker  SIGKILL to a data loading worker
    node    a node is set DOWN, as SLURM does where one does not answer

    python -m benchmarks.faults.slurm_failures [--events hang kill worker node] [--nodes 3] [--quick] --json
"""

import os
import signal
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import Benchmark
from tests.runs.test_failures import data_worker
from tests.support import slurm
from tests.support.tiny_run import (
    events_of,
    rank_process,
    steps_of,
    submit,
    wait_until,
    write_config,
    write_tiny_data,
)

EVENTS = ("hang", "kill", "worker", "node")
HANG_SECONDS = 6.0
_LOOK_SECONDS = 2.0  # the watchdog's
_DUMP_SECONDS = 5.0  # from the first rank that noticed to the requeue
_SLURM_SECONDS = 5.0


def strike(event: str, config: Path, run: Path) -> None:
    if event == "node":
        slurm.fail_node("n2")
    elif event == "worker":
        os.kill(data_worker(run), signal.SIGKILL)
    else:
        pid = rank_process(config.parent, 1, run.name)
        os.kill(pid, signal.SIGSTOP if event == "hang" else signal.SIGKILL)


def has_stack(run: Path, rank: int) -> bool:
    """Whether a rank wrote where it was: by itself, or its log's dump when it was ended."""
    log = (run / "logs" / f"rank-{rank}.log").read_text(errors="replace")
    return (run / "stacks" / f"rank-{rank}.txt").exists() or "most recent call" in log


def lost_steps(run: Path, reached: int) -> int:
    """Steps that were done and had to be done again."""
    resumed = [event["step"] for event in events_of(run) if event["event"] == "resume"]
    return reached - resumed[0] if resumed else reached


def main() -> int:
    bench = Benchmark("slurm_failures", __doc__)
    bench.parser.add_argument("--events", nargs="+", choices=EVENTS, help="all, or hang with --quick")
    bench.parser.add_argument("--nodes", type=int, default=3, help="of four: one may fail (3)")
    options = bench.parse()
    if reason := slurm.why_not():
        bench.skip(reason)
        return bench.finish()
    was_up = slurm.is_up()
    os.environ["SLURM_CONF"] = str(slurm.up())
    try:
        with tempfile.TemporaryDirectory() as name:
            config = write_config(
                Path(name) / "tiny.yaml",
                write_tiny_data(Path(name) / "data"),
                optim={"score_lr": 300.0},
                train={"epochs": 40, "global_batch_size": 12},
                checkpoint={"every_steps": 5, "hang_minutes": HANG_SECONDS / 60},
                engine={"device": "cpu", "threads": 1, "workers": 1},
            )
            calm = submit(config, "run.name=calm", nodes=options.nodes, timeout=600)
            if calm.returncode:
                raise RuntimeError(calm.stderr)
            for event in options.events or (EVENTS[:1] if options.quick else EVENTS):
                measure(bench, event, config, options.nodes)
    finally:
        if not was_up:
            slurm.down()
    return bench.finish()


def measure(bench: Benchmark, event: str, config: Path, nodes: int) -> None:
    done = submit(config, f"run.name={event}", "launch.exclusive=true", nodes=nodes, cluster="slurm")
    if done.returncode:
        raise RuntimeError(done.stderr)
    run, job = config.parent / event, slurm.submitted_job(done.stdout)
    wait_until(lambda: len(steps_of(run)) > 30, 300)
    strike(event, config, run)
    struck = time.monotonic()
    while slurm.job_state(job) == "RUNNING" and time.monotonic() - struck < 120:
        time.sleep(0.1)
    bench.figure(f"{event}_seconds_until_requeued", time.monotonic() - struck)
    if event == "hang":
        limit = HANG_SECONDS + _LOOK_SECONDS + _DUMP_SECONDS + _SLURM_SECONDS
        bench.target("hang_seconds_until_requeued", max=limit)
    slurm.wait_for_state(job, "PENDING")
    reached = max(steps_of(run))
    if event == "node":
        slurm.resume_node("n2")
    slurm.start_again(job)
    state = slurm.wait_for_end(job)
    finished = state == "COMPLETED" and (run / "result.json").exists()
    same = finished and (run / "final.mask").read_bytes() == (run.parent / "calm" / "final.mask").read_bytes()
    bench.figure(f"{event}_finished", float(finished), min=1.0)
    bench.figure(f"{event}_masks_bit_identical", float(same), min=1.0)
    bench.figure(f"{event}_steps_done_again", lost_steps(run, reached), max=5)
    if event == "hang":
        bench.figure("hang_ranks_with_stacks", sum(has_stack(run, rank) for rank in range(nodes)), min=nodes)


if __name__ == "__main__":
    sys.exit(main())
