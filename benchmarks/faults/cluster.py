"""What a cluster does to a run, on a real SLURM of four virtual nodes (started here where none is up; root).

Every case ends in the masks of a run that nobody disturbed, or in a refusal that names what is in the way.

    typed      the README's command as it stands there, with a site file; preempted while the dispatcher
               and while experts train (see `cluster_typed`)
    chain      the job may not be requeued: preempted, and a process killed, it goes on as a chain of jobs
    fewer      `--nodes 2:4`: one of four nodes is lost, and the job comes back on three
    device     a rank's device fails: its node is left out, and the run ends on the others
    straggler  one of three ranks is stopped for most of the time: `selfmask status` names it
    pending    the nodes are taken: `status` and `logs` say what the job waits for
    twice      one run is submitted again while it waits, while it runs (or past the launcher), and after

A case that stands in the result file already is not measured again, unless it is named.

    python -m benchmarks.faults.cluster [--cases chain fewer ...] [--quick] --json
"""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.faults.cluster_typed import typed
from benchmarks.harness import RESULTS, Benchmark
from selfmask_dist.maskfile.file import read_mask_file
from selfmask_dist.runs.ending.notes import EndNotes
from selfmask_dist.runs.exit_status import DEVICE
from tests.support import slurm
from tests.support.planted import DEVICE_FAULT, plant
from tests.support.tiny_run import (
    ROOT,
    child_environment,
    events_of,
    rank_process,
    steps_of,
    submit,
    wait_until,
    write_config,
    write_tiny_data,
)

NODES = 3
_EPOCHS = 60  # of four steps
_LIKE_ON_FEWER = 0.99  # share of bits that other numbers of processes leave the same: sums round otherwise


@dataclass(frozen=True)
class Place:
    """Where the small runs of all cases lie, and what they have in common."""

    bench: Benchmark
    config: Path

    @property
    def folder(self) -> Path:
        """Return the folder of all runs."""
        return self.config.parent

    def start(self, name: str, *words: str, nodes: str = str(NODES)) -> tuple[str, Path]:
        """Submit a run, and return its job and its folder."""
        done = self.submit(name, *words, nodes=nodes)
        if done.returncode:
            raise RuntimeError(done.stderr)
        return slurm.submitted_job(done.stdout), self.folder / name

    def submit(self, name: str, *words: str, nodes: str = str(NODES)) -> subprocess.CompletedProcess[str]:
        """Give a run to the launcher, which may refuse it."""
        keys = [f"run.name={name}", "launch.exclusive=true", *words]
        return submit(self.config, *keys, nodes=nodes, cluster="slurm")  # type: ignore[arg-type]

    def plain(self, text: str) -> str:
        """Return a text without the folder, which is another one each time."""
        return text.strip().replace(f"{self.folder}/", "")

    def calm(self, nodes: int = NODES) -> Path:
        """Return the folder of a run that nobody disturbs, made once on local processes."""
        run = self.folder / f"calm-{nodes}"
        if not run.exists():
            done = submit(self.config, f"run.name={run.name}", nodes=nodes, timeout=600)
            if done.returncode:
                raise RuntimeError(done.stderr)
        return run

    def compare(self, case: str, run: Path) -> None:
        """Record whether a run has ended, with the masks of the calm one, and made each step once."""
        calm = self.calm()
        finished = (run / "result.json").exists()
        same = finished and (run / "final.mask").read_bytes() == (calm / "final.mask").read_bytes()
        self.bench.figure(f"{case}_finished", float(finished), min=1.0)
        self.bench.figure(f"{case}_masks_bit_identical", float(same), min=1.0)
        self.bench.figure(f"{case}_each_step_once", float(steps_of(run) == steps_of(calm)), min=1.0)


def selfmask(*words: str) -> subprocess.CompletedProcess[str]:
    """Run a command of `selfmask`."""
    command = [sys.executable, "-m", "selfmask_dist.cli", *words]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env=child_environment()
    )


def chain(place: Place) -> None:
    """The job's first end is a preemption, its second a killed process; each submits the next job."""
    job, run = place.start("chain", "launch.sbatch={requeue: false}")
    jobs = [job]
    wait_until(lambda: len(steps_of(run)) > 30, 300)
    refusal = slurm.requeue_refusal(job)
    with slurm.nodes_taken():
        slurm.wait_for_end(jobs[-1])
        jobs.append(_next_job(run, jobs[-1]))
    wait_until(lambda: slurm.job_state(jobs[-1]) == "RUNNING" and len(steps_of(run)) > 100, 300)
    os.kill(rank_process(place.folder, 1, run.name), signal.SIGKILL)
    slurm.wait_for_end(jobs[-1])
    jobs.append(_next_job(run, jobs[-1]))
    status = selfmask("status", str(run)).stdout
    last = slurm.wait_for_end(jobs[-1])
    place.bench.figure("chain_requeue_is_refused", float("disabled" in refusal), min=1.0)
    place.bench.figure("chain_jobs", len(set(jobs)), min=3, max=3)
    place.bench.figure("chain_last_job_completed", float(last == "COMPLETED"), min=1.0)
    place.bench.figure(
        "chain_status_shows_the_next_job", float(jobs[-1] in status or "running" in status), min=1.0
    )
    place.compare("chain", run)


def _next_job(run: Path, job: str) -> str:
    pattern = f".after-{job}-*"
    wait_until(lambda: list((run / "slurm").glob(pattern)), 60)
    (path,) = (run / "slurm").glob(pattern)
    return path.name.rpartition("-")[2]


def fewer(place: Place) -> None:
    """One of four nodes goes DOWN: SLURM requeues the job, which comes back on the three that are left."""
    job, run = place.start("fewer", nodes="2:4")
    wait_until(lambda: len(steps_of(run)) > 30, 300)
    before = slurm.job_field(job, "NumNodes")
    slurm.fail_node("n2")
    try:
        slurm.start_again(job)
        after = slurm.job_field(job, "NumNodes")
        state = slurm.wait_for_end(job)
    finally:
        slurm.resume_node("n2")
    calm = place.calm(4)
    sizes = [event["world_size"] for event in events_of(run) if event["event"] == "start"]
    place.bench.figure("fewer_nodes_before", int(before), min=4)
    place.bench.figure("fewer_nodes_after", int(after), min=3, max=3)
    place.bench.figure("fewer_processes_of_each_start", sizes)
    place.bench.figure("fewer_finished", float(state == "COMPLETED"), min=1.0)
    place.bench.figure("fewer_bits_like_the_calm_run", _share_alike(run, calm), min=_LIKE_ON_FEWER)
    # the same batches: each step once, but for those behind the newest checkpoint
    place.bench.figure("fewer_each_step_once", float(steps_of(run) == steps_of(calm)), min=1.0)


def _share_alike(run: Path, other: Path) -> float:
    """Return the share of weights that two runs' masks keep or prune alike."""
    same, total = 0, 0
    first, second = (read_mask_file(folder / "final.mask").masks for folder in (run, other))
    for name, mask in first.items():
        for parameter, bits in mask.bits.items():
            same += int(torch.eq(bits, second[name].bits[parameter]).sum())
            total += bits.numel()
    return same / total


def device(place: Place) -> None:
    """One rank raises what torch says of memory that failed; three of four nodes can go on."""
    path = plant(place.folder / "plant", DEVICE_FAULT, rank=1, step=42, once=True)
    planted = ["launch.snapshot=false", f"launch.environment={{PYTHONPATH: '{path}'}}"]
    job, run = place.start("device", *planted)
    wait_until(lambda: slurm.job_state(job) == "PENDING" and steps_of(run), 300)
    slurm.start_again(job)
    slurm.wait_for_end(job)
    excluded = slurm.job_field(job, "ExcNodeList")
    bad = EndNotes(run / "logs" / f".ends-{job}-0").nodes(DEVICE)
    place.bench.figure("device_node_left_out", float(bad == [excluded]), min=1.0)
    place.bench.figure(
        "device_ran_elsewhere", float(excluded not in slurm.job_field(job, "NodeList")), min=1.0
    )
    place.compare("device", run)


def straggler(place: Place) -> None:
    """A rank's process is stopped nine tenths of the time: it takes ten times as long for everything."""
    job, run = place.start("straggler", "run.log_every=10")
    wait_until(lambda: len(steps_of(run)) > 1, 300)
    lines: list[str] = []
    with _slowed(rank_process(place.folder, 1, run.name)):
        start = time.monotonic()
        while not lines and time.monotonic() - start < 120:
            text = selfmask("status", str(run)).stdout
            lines = [line for line in text.splitlines() if "is slow" in line]
    slurm.wait_for_end(job)
    place.bench.figure("straggler_named", float(bool(lines)), min=1.0)
    only = all("rank 1 is slow" in line for line in lines)  # it may be slow in two ways
    place.bench.figure("straggler_only_it_is_named", float(only), min=1.0)
    place.bench.figure("straggler_status_says", lines)
    finished = (run / "result.json").exists()
    same = finished and (run / "final.mask").read_bytes() == (place.calm() / "final.mask").read_bytes()
    place.bench.figure("straggler_finished", float(finished), min=1.0)
    place.bench.figure("straggler_masks_bit_identical", float(same), min=1.0)


@contextlib.contextmanager
def _slowed(pid: int, *, on: float = 0.01, off: float = 0.09) -> Iterator[None]:
    ended = threading.Event()

    def turns() -> None:
        with contextlib.suppress(ProcessLookupError):
            while not ended.wait(on):
                os.kill(pid, signal.SIGSTOP)
                time.sleep(off)
                os.kill(pid, signal.SIGCONT)

    thread = threading.Thread(target=turns)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def pending(place: Place) -> None:
    """All nodes are taken by a job of the higher partition."""
    with slurm.nodes_taken():
        job, run = place.start("pending")
        wait_until(lambda: slurm.job_field(job, "Reason") != "None", 60)
        status, logs = selfmask("status", str(run)), selfmask("logs", str(run))
    place.bench.figure("pending_status_says", status.stdout.splitlines()[-1])
    place.bench.figure("pending_logs_say", place.plain(logs.stderr))
    waits = f"waits in SLURM as job {job} ("
    place.bench.figure("pending_status_names_job_and_reason", float(waits in status.stdout), min=1.0)
    place.bench.figure("pending_logs_name_job_and_reason", float(waits in logs.stderr), min=1.0)
    slurm.wait_for_end(job)
    place.compare("pending", run)


def twice(place: Place) -> None:
    """Each submission after the first is refused with the job that has the run, and nothing is disturbed."""
    refusals = {}
    with slurm.nodes_taken():
        job, run = place.start("twice")
        refusals["while_pending"] = place.submit("twice")
    wait_until(lambda: len(steps_of(run)) > 10, 300)
    command = [sys.executable, "-m", "selfmask_dist.cli", "train", f"--config={place.config}"]
    output = place.folder / "past.out"
    words = [*command, "run.name=twice", "run.resume=true"]
    past = slurm.sbatch(shlex.join(words), output, "--nodes=1", "--no-requeue")
    refusals["while_running"] = place.submit("twice")
    refusals["while_running_to_resume"] = place.submit("twice", "run.resume=true")
    ended = slurm.wait_for_end(past)
    for name, done in refusals.items():
        is_right = done.returncode == 2 and f"job {job}" in done.stderr
        place.bench.figure(f"twice_{name}_says", place.plain(done.stderr))
        place.bench.figure(f"twice_{name}_refused", float(is_right), min=1.0)
    is_right = ended == "FAILED" and f"SLURM job {job}" in output.read_text()
    place.bench.figure("twice_past_the_launcher_refused", float(is_right), min=1.0)
    slurm.wait_for_end(job)
    again = place.submit("twice", "run.resume=true")
    is_right = again.returncode == 0 and "is finished" in again.stderr
    place.bench.figure("twice_when_done_says_so", float(is_right), min=1.0)
    place.compare("twice", run)


CASES: dict[str, Callable[[Place], None]] = {
    "typed": lambda place: typed(place.bench, place.folder / "typed"),
    "chain": chain,
    "fewer": fewer,
    "device": device,
    "straggler": straggler,
    "pending": pending,
    "twice": twice,
}


def carry_over(bench: Benchmark, path: Path, measured: list[str] | None) -> list[str]:
    """Take over the figures of an earlier, unfinished result, and return the cases that are left to measure.

    Args:
        measured: cases that are measured whatever the result says; None for those that are not in it.
    """
    known = json.loads(path.read_text()) if path.exists() else {"figures": {}, "targets": {}}
    done = {name.partition("_")[0] for name in known["figures"]}
    cases = [case for case in CASES if case not in done] if measured is None else measured
    for name, value in known["figures"].items():
        if name.partition("_")[0] not in cases:
            bench.figure(name, value, **known["targets"].get(name, {}))
    return cases


def main() -> int:
    bench = Benchmark("cluster", __doc__)
    bench.parser.add_argument("--cases", nargs="+", choices=CASES, help="again, whatever the result says")
    options = bench.parse()
    if reason := slurm.why_not():
        bench.skip(reason)
        return bench.finish()
    path = options.out or RESULTS / f"cluster{'.quick' if options.quick else ''}.json"
    cases = carry_over(bench, path, options.cases or (["pending"] if options.quick else None))
    was_up = slurm.is_up()
    os.environ["SLURM_CONF"] = str(slurm.up())
    try:
        with tempfile.TemporaryDirectory() as name:
            config = write_config(
                Path(name) / "tiny.yaml",
                write_tiny_data(Path(name) / "data"),
                optim={"score_lr": 300.0},
                train={"epochs": _EPOCHS, "global_batch_size": 12},
                checkpoint={"every_steps": 5},
                engine={"device": "cpu", "threads": 1, "workers": 1},
            )
            for case in cases:
                start = time.perf_counter()
                CASES[case](Place(bench, config))
                bench.figure(f"{case}_seconds", time.perf_counter() - start)
                path.write_text(json.dumps(bench.result(), indent=2) + "\n")  # so far
    finally:
        if not was_up:
            slurm.down()
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
