"""A run as one SLURM job, through submitit: every task starts one training process and answers for it.

    sbatch -> srun -> Task on every rank -> `selfmask train`
    told to stop (USR2, TERM) -> the process saves and ends with REQUEUE -> `scontrol requeue` -> once more

A cascade may also be three jobs, each after the one before: up to the router, the experts as a job array with
a task for each, and the rest. They are the same command, restricted to a part.

Ranks meet on the first host of the job's node list, at a port derived from the job id: nothing is asked of
the cluster from inside the job but the requeue itself. Knows nothing of training.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from selfmask_dist.common.optional import require
from selfmask_dist.config import Config
from selfmask_dist.runs.exit_status import FAILED, HUNG, LOST, REQUEUE, is_restartable
from selfmask_dist.runs.folder import run_path
from selfmask_dist.runs.submitted import note_jobs

from .local import log_path
from .restarts import MAX_FRUITLESS, is_fruitless
from .snapshot import snapshot_environment, take_snapshot

_FIRST_PORT, _NUM_PORTS = 20_000, 12_000  # below the range from which Linux gives outgoing connections theirs
_PEER_SECONDS = 10.0  # for the task whose process was killed to speak before those that failed with it
_LOST_SECONDS = 20.0  # for a task whose process failed to speak before those that lost it
_DUMP_SECONDS = 5.0  # for the other processes to notice that all hang, and to dump their stacks
_END_SECONDS = 300.0  # for SLURM to end a job that is done saving, or its rank 0 to requeue it
_POLL_SECONDS = 0.5
_OPEN_STATES = ("PENDING", "RUNNING", "SUSPENDED", "CONFIGURING", "COMPLETING", "REQUEUED", "REQUEUE_HOLD")


@dataclass
class TrainTask:
    """What submitit runs in every task of the job: one training process, watched to its end."""

    train_arguments: tuple[str, ...]
    logs: Path
    container: tuple[str, ...] = ()
    master_port: int | None = None
    threads: int | None = None
    max_restarts: int = 0

    def __call__(self) -> None:
        place = rank_environment(os.environ, master_port=self.master_port)
        threads = str(self.threads or os.environ.get("OMP_NUM_THREADS", 1))
        command = [
            *(*self.container, sys.executable, "-m", "selfmask_dist.cli", "train"),
            *self.train_arguments,
        ]
        self.logs.mkdir(parents=True, exist_ok=True)
        with open(log_path(self.logs, int(place["RANK"])), "ab") as log:
            log.write(f"---- start {place['SELFMASK_RESTARTS']} of job {own_job_id(os.environ)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                command,
                env={**os.environ, **place, "OMP_NUM_THREADS": threads},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        seen: set[int] = set()
        hung = self._note("hung")

        def pass_on(signum: int, _frame: FrameType | None) -> None:
            seen.add(signum)
            if signum == signal.SIGTERM and hung.exists():  # requeued: what hangs shows where it does
                process.send_signal(signal.SIGABRT)
                process.send_signal(signal.SIGCONT)
            process.send_signal(signum)

        for signum in (signal.SIGUSR2, signal.SIGTERM):  # in place of submitit's own handlers
            signal.signal(signum, pass_on)
        status = process.wait()
        if status == 0:
            return
        print(f"rank {place['RANK']} ended with status {status}", file=sys.stderr, flush=True)
        self._after_failure(status, int(place["RANK"]), is_announced=signal.SIGUSR2 in seen)
        sys.exit(status if status > 0 else 128 - status)

    def _after_failure(self, status: int, rank: int, *, is_announced: bool) -> None:
        """Requeue the job where that is worth it; on the other ranks, wait until that is done: srun ends all
        tasks as soon as one has ended, and a job that ends by itself is not requeued by a preemption that is
        under way.
        """
        job_id, restarts = own_job_id(os.environ), int(os.environ.get("SLURM_RESTART_COUNT", 0))
        verdict, claimed, requeued = (self._note(name) for name in ("failed", "claimed", "requeued"))
        if not is_restartable(status):
            if status == FAILED:
                time.sleep(_PEER_SECONDS)
            verdict.touch()  # srun now ends the other tasks: they are not to take that for a preemption
            return
        if status == LOST:
            _wait_until(lambda: verdict.exists() or claimed.exists(), _LOST_SECONDS)
        if verdict.exists():
            return
        if restarts >= self.max_restarts:
            print(f"not requeued: {restarts} restarts were launch.max_restarts", file=sys.stderr, flush=True)
            return
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing is left to save: SLURM may have the node
        if shutil.which("scontrol") is None:
            print(
                "no scontrol on this node: SLURM itself requeues a preempted job", file=sys.stderr, flush=True
            )
            time.sleep(_END_SECONDS)
        elif (status != REQUEUE or rank == 0) and _claim(claimed):
            if status == HUNG:
                self._note("hung").touch()
                time.sleep(_DUMP_SECONDS)
            if status != REQUEUE and is_fruitless(self.logs, job_id):
                print(f"not requeued: {MAX_FRUITLESS} starts in a row came to nothing", file=sys.stderr)
                verdict.touch()
            else:
                requeue(job_id, is_announced=is_announced)
            requeued.touch()
        else:
            _wait_until(requeued.exists, _END_SECONDS)

    def _note(self, name: str) -> Path:
        """Return the file by which the tasks of this start of the job tell each other something."""
        start = f"{own_job_id(os.environ)}-{os.environ.get('SLURM_RESTART_COUNT', 0)}"
        return self.logs / f".{name}-{start}"


def _claim(path: Path) -> bool:
    """Return whether this task is the first to ask."""
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


def own_job_id(environment: Mapping[str, str]) -> str:
    """Return what SLURM's commands call this job: the id of an array alone would mean all of its tasks."""
    if "SLURM_ARRAY_TASK_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment["SLURM_JOB_ID"]


def requeue(job_id: str, *, is_announced: bool) -> bool:
    """Ask SLURM to run this job again, and return whether it will.

    A job that got SIGTERM only was either cancelled by its user, who does not want it back, or preempted on a
    cluster that does not announce preemptions: while it is being cancelled its state is no longer RUNNING.
    """
    if not is_announced and job_state(job_id) != "RUNNING":
        print("not requeued: the job was cancelled", file=sys.stderr, flush=True)
        return False
    done = subprocess.run(["scontrol", "requeue", job_id], capture_output=True, text=True, check=False)
    print(f"requeue of job {job_id}: {done.stderr.strip() or 'done'}", file=sys.stderr, flush=True)
    return done.returncode == 0


def rank_environment(environment: Mapping[str, str], *, master_port: int | None = None) -> dict[str, str]:
    """Return torchrun's variables for this task, from SLURM's. Every rank finds the same without asking."""
    job_id = int(environment["SLURM_JOB_ID"])
    restarts = environment.get("SLURM_RESTART_COUNT", "0")
    nodes = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
    world_size = environment.get("SLURM_STEP_NUM_TASKS") or environment["SLURM_NTASKS"]
    num_nodes = environment.get("SLURM_STEP_NUM_NODES") or environment["SLURM_JOB_NUM_NODES"]
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": world_size,
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(int(world_size) // int(num_nodes)),
        "GROUP_RANK": environment["SLURM_NODEID"],
        "MASTER_ADDR": first_host(nodes),
        "MASTER_PORT": str(master_port or port_of(job_id, int(restarts))),
        "SELFMASK_RESTARTS": restarts,
    }


def first_host(nodes: str) -> str:
    """Return the first host of SLURM's compressed list: `gpu03` of `gpu[03-05,9],login`."""
    first = re.match(r"(?:[^\[,]|\[[^\]]*\])+", nodes)
    if first is None:
        raise ValueError(f"SLURM's node list {nodes!r} names no host")
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first.group())


def port_of(job_id: int, restart: int = 0) -> int:
    """Return the port where the ranks meet: the same on all nodes, another one for the next start."""
    return _FIRST_PORT + (31 * job_id + restart) % _NUM_PORTS


@dataclass(frozen=True)
class Job:
    """A job to submit: the parts of a run that it makes, several as the tasks of an array."""

    folders: tuple[Path, ...]  # in which `logs` are written
    parts: tuple[str, ...] = ()  # of a cascade; empty for all of it


def jobs_of(config: Config, *, experts_array: bool) -> list[Job]:
    """Return the jobs of a run, each to start when the one before has ended well."""
    run = run_path(config).resolve()
    if not experts_array:
        return [Job((run,))]
    experts = tuple(f"expert-{k}" for k in range(max(config.cascade.clusters)))
    return [
        Job((run,), ("router",)),
        Job(tuple(run / name for name in experts), experts),
        Job((run,), ("combination",)),
    ]


def submit(
    config: Config, *, num_nodes: int, train_arguments: Sequence[str], experts_array: bool = False
) -> str:
    """Submit the run's jobs, print where they write, and return the id of the last one."""
    run = run_path(config).resolve()
    if config.launch.snapshot:
        take_snapshot(run)
    (run / "slurm").mkdir(parents=True, exist_ok=True)
    after, ids = "", []
    for job in jobs_of(config, experts_array=experts_array):
        tasks = [
            TrainTask(
                (*train_arguments, *(f"--part={part}" for part in job.parts[index : index + 1])),
                folder / "logs",
                config.launch.container,
                config.launch.master_port,
                config.engine.threads,
                config.launch.max_restarts,
            )
            for index, folder in enumerate(job.folders)
        ]
        executor = _executor(config, run / "slurm", num_nodes, after=after)
        submitted = executor.map_array(TrainTask.__call__, tasks)
        after = str(submitted[0].job_id).partition("_")[0]
        ids.append(after)
        note_jobs(run, ids)
        what = f" ({', '.join(job.parts)})" if job.parts else ""
        places = ", ".join(str(task.logs) for task in tasks)
        print(f"submitted job {after}{what}; its processes write to {places}", flush=True)
    return after


def batch_scripts(config: Config, *, num_nodes: int, experts_array: bool = False) -> str:
    """Return what sbatch would get, a script for each job. Needs no program of SLURM's.

    submitit has no public way to show it.
    """
    scripts, after, folder = [], "", run_path(config).resolve() / "slurm"
    for job in jobs_of(config, experts_array=experts_array):
        executor = _executor(config, folder, num_nodes, after=after, is_dry=True)
        if len(job.folders) > 1:
            executor.parameters["map_count"] = len(job.folders)
        scripts.append(str(executor._make_submission_file_text("<task>", "dry-run")))
        after = "<the job before>"
    return "\n".join(scripts)


def wait_for(job_id: str) -> int:
    """Wait until the job has ended, and return 0 where it completed, else 1."""
    while (state := job_state(job_id)) in _OPEN_STATES:
        time.sleep(_POLL_SECONDS)
    print(f"job {job_id} ended: {state}", flush=True)
    return 0 if state == "COMPLETED" else 1


def job_state(job_id: str) -> str:
    """Return the job's state as squeue names it; UNKNOWN for one that SLURM has forgotten."""
    command = ["squeue", "--noheader", "--states=all", f"--jobs={job_id}", "--format=%T"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout.split() or ["UNKNOWN"])[0]


def _executor(config: Config, folder: Path, num_nodes: int, *, after: str = "", is_dry: bool = False) -> Any:
    """Return submitit's executor of a job.

    Args:
        after: the id of the job that must have ended well before this one starts.
        is_dry: the executor only writes the script, so that SLURM may be missing here.

    Raises:
        MissingLibraryError: submitit is not installed.
    """
    submitit = require("submitit", "submitit", needed_by="--cluster slurm")

    launch = config.launch
    srun = ["--kill-on-bad-exit=1"]
    if launch.cpus_per_process:  # since Slurm 22.05 srun no longer takes it from the job
        srun.append(f"--cpus-per-task={launch.cpus_per_process}")
    variables = dict(launch.environment)
    if launch.snapshot:
        variables |= snapshot_environment(folder.parent)
    exports = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    more = {"dependency": f"afterok:{after}", "kill_on_invalid_dep": "yes"} if after else {}
    options: dict[str, Any] = {
        "job_name": config.run.name,
        "nodes": num_nodes,
        "ntasks_per_node": launch.processes_per_node or launch.gpus_per_node or 1,
        "time": max(round(launch.hours * 60), 1),
        "signal_delay_s": launch.signal_seconds,
        "partition": launch.partition,
        "account": launch.account,
        "qos": launch.qos,
        "constraint": launch.constraint,
        "gpus_per_node": launch.gpus_per_node,
        "cpus_per_task": launch.cpus_per_process,
        "mem": f"{launch.memory_gb}GB" if launch.memory_gb else None,
        "exclusive": launch.exclusive or None,
        "mail_user": launch.mail,
        "mail_type": "END,FAIL,REQUEUE" if launch.mail else None,
        "setup": [*launch.setup, *exports],
        "srun_args": srun,
        "additional_parameters": {"requeue": True, **launch.sbatch, **more},
    }
    kind = submitit.SlurmExecutor
    if is_dry:  # submitit refuses to make an executor where srun is missing; the script needs none
        kind = type("ScriptWriter", (kind,), {"affinity": classmethod(lambda _: 2)})
    executor = kind(folder=folder)
    executor.update_parameters(**{name: value for name, value in options.items() if value is not None})
    return executor
