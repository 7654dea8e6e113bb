"""A run as one SLURM job, through submitit: every task starts one training process and answers for it.

    sbatch -> srun -> Task on every rank -> `selfmask train`
    told to stop (USR2, TERM) -> the process saves and ends with REQUEUE -> `scontrol requeue` -> once more
                                          (or, where that is not allowed, the next job of a chain)
    failed -> `requeue.Aftermath`

A cascade may also be three jobs, each after the one before: up to the router, the experts as a job array with
a task for each, and the rest. They are the same command, restricted to a part.

Ranks meet on the first host of the job's node list, at a port derived from the job id: nothing is asked of
the cluster from inside the job but the requeue itself. Knows nothing of training.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from selfmask_dist.common import names
from selfmask_dist.common.optional import require
from selfmask_dist.config import Config
from selfmask_dist.config.conflicts.general import ACCUMULATING
from selfmask_dist.runs.ending.notes import FOLDER_VARIABLE
from selfmask_dist.runs.folder import run_path
from selfmask_dist.runs.owner import CHAIN_VARIABLE
from selfmask_dist.runs.submitted import note_jobs

from . import local
from .binding import bind_near_gpu
from .chain import chain_of, next_job, restarts_of
from .requeue import FAILED_NOTE, HUNG_NOTE, Aftermath, job_state, own_job_id, start_notes
from .snapshot import snapshot_environment, take_snapshot

_FIRST_PORT, _NUM_PORTS = 20_000, 12_000  # below the range from which Linux gives outgoing connections theirs
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
    requeue: Literal["auto", "requeue", "chain"] = "requeue"
    submitted: Path | None = None  # where submitit writes
    # what train.accumulate is on the most nodes, and these; None where it stays as it is on any number
    accumulate_on_most: tuple[int, int] | None = None
    python: str | None = None  # in the container; None where it is this one
    bind: bool = False  # to the CPUs near its GPU
    stacks: Path | None = None  # where NCCL writes, for a task of an array, whose script says it for all

    def __call__(self) -> None:
        place = rank_environment(os.environ, master_port=self.master_port)
        threads = str(self.threads or os.environ.get("OMP_NUM_THREADS", 1))
        command = self.command(place)
        self.logs.mkdir(parents=True, exist_ok=True)
        rank, notes = int(place["RANK"]), start_notes(self.logs, os.environ)
        num_ranks, per_node = int(place["WORLD_SIZE"]), int(place["LOCAL_WORLD_SIZE"])
        log_file = local.log_path(self.logs, rank, num_ranks=num_ranks, per_node=per_node)
        with open(log_file, "ab") as log:
            log.write(f"---- start {place['SELFMASK_RESTARTS']} of job {own_job_id(os.environ)}\n".encode())
            if self.bind and (bound := bind_near_gpu(int(place["LOCAL_RANK"]), os.environ)):
                log.write(f"{bound}\n".encode())
            log.flush()
            variables = {**place, "OMP_NUM_THREADS": threads, FOLDER_VARIABLE: str(notes.folder)}
            if self.stacks is not None:
                variables[local.RECORDER_FILE] = local.recorder_file(self.stacks)
            if "SLURM_ARRAY_TASK_ID" not in os.environ:
                variables[CHAIN_VARIABLE] = chain_of(os.environ)
            process = subprocess.Popen(
                command, env={**os.environ, **variables}, stdout=log, stderr=subprocess.STDOUT
            )
        end = Aftermath(
            os.environ, notes, log_file, self.max_restarts, how=self.requeue, submitted=self.submitted
        )

        def pass_on(signum: int, _frame: FrameType | None) -> None:
            end.seen.add(signum)
            if process.poll() is not None:
                return
            if signum == signal.SIGTERM and notes.has(HUNG_NOTE):  # requeued: what hangs shows where it does
                process.send_signal(signal.SIGABRT)
                process.send_signal(signal.SIGCONT)
            elif signum == signal.SIGTERM and notes.has(FAILED_NOTE):  # nothing is to be saved any more
                if rank not in notes.statuses():  # it does not know, or is about to say why
                    process.kill()
                return
            process.send_signal(signum)

        for signum in (signal.SIGUSR2, signal.SIGTERM):  # in place of submitit's own handlers
            signal.signal(signum, pass_on)
        status = process.wait()
        if status == 0:
            return
        print(f"rank {rank} ended with status {status}", file=sys.stderr, flush=True)
        end.settle(status, rank=rank, num_ranks=num_ranks)
        sys.exit(status if status > 0 else 128 - status)

    def command(self, place: Mapping[str, str]) -> list[str]:
        """Return what starts the training process, in its container where there is one."""
        python = self.python or sys.executable
        train = [*self.container, python, "-m", "selfmask_dist.cli", "train"]
        return [*train, *self.train_arguments, *self._micro_steps(place)]

    def _micro_steps(self, place: Mapping[str, str]) -> list[str]:
        """Return the override that lets a process on fewer nodes hold no more images at once than on most."""
        if self.accumulate_on_most is None:
            return []
        nodes = int(place["WORLD_SIZE"]) // int(place["LOCAL_WORLD_SIZE"])
        return [f"train.accumulate={micro_steps_on(nodes, *self.accumulate_on_most)}"]


def micro_steps_on(nodes: int, accumulate: int, most: int) -> int:
    """Return `train.accumulate` on some nodes, where it is `accumulate` on the most that a job may get: each
    process has more images of the global batch there, and goes through them in more micro-steps.
    """
    return -(-accumulate * most // nodes)


def rank_environment(environment: Mapping[str, str], *, master_port: int | None = None) -> dict[str, str]:
    """Return torchrun's variables for this task, from SLURM's. Every rank finds the same without asking."""
    job_id = int(environment["SLURM_JOB_ID"])
    restarts = restarts_of(environment)
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
        "MASTER_PORT": str(master_port or port_of(job_id, restarts)),
        "SELFMASK_RESTARTS": str(restarts),
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
    config: Config,
    *,
    num_nodes: int,
    train_arguments: Sequence[str],
    least_nodes: int | None = None,
    experts_array: bool = False,
) -> str:
    """Submit the run's jobs, print where they write, and return the id of the last one.

    Args:
        least_nodes: SLURM may give any number of nodes from this one on, up to `num_nodes`.
    """
    run = run_path(config).resolve()
    if config.launch.snapshot:
        take_snapshot(run)
    for name in ("slurm", *((names.STACKS,) if config.launch.gpus_per_node else ())):
        (run / name).mkdir(parents=True, exist_ok=True)
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
                # a job that others wait for (afterok) must not end without being requeued
                "requeue" if experts_array else config.launch.requeue,
                run / "slurm",
                accumulate_on_most(config, num_nodes, least_nodes),
                config.launch.container_python,
                config.launch.bind and bool(config.launch.gpus_per_node),
                own_stacks(config, folder) if len(job.folders) > 1 else None,
            )
            for index, folder in enumerate(job.folders)
        ]
        nodes = node_range(num_nodes, least_nodes)
        executor = make_executor(config, run / "slurm", nodes, after=after)
        submitted = executor.map_array(TrainTask.__call__, tasks)
        after = str(submitted[0].job_id).partition("_")[0]
        ids.append(after)
        note_jobs(run, ids)
        what = f" ({', '.join(job.parts)})" if job.parts else ""
        places = ", ".join(str(task.logs) for task in tasks)
        print(f"submitted job {after}{what}; its processes write to {places}", flush=True)
    return after


def batch_scripts(
    config: Config, *, num_nodes: int, least_nodes: int | None = None, experts_array: bool = False
) -> str:
    """Return what sbatch would get, a script for each job. Needs no program of SLURM's.

    submitit has no public way to show it.
    """
    scripts, after, folder = [], "", run_path(config).resolve() / "slurm"
    for job in jobs_of(config, experts_array=experts_array):
        nodes = node_range(num_nodes, least_nodes)
        executor = make_executor(config, folder, nodes, after=after, is_dry=True)
        if len(job.folders) > 1:
            executor.parameters["map_count"] = len(job.folders)
        scripts.append(str(executor._make_submission_file_text("<task>", "dry-run")))
        after = "<the job before>"
    return "\n".join(scripts)


def own_stacks(config: Config, folder: Path) -> Path | None:
    """Return the folder, which is made, where NCCL writes for one task of an array.

    None where there are no GPUs, or the configuration says itself where it writes.
    """
    if not config.launch.gpus_per_node or local.RECORDER_FILE in config.launch.environment:
        return None
    stacks = folder / names.STACKS
    stacks.mkdir(parents=True, exist_ok=True)
    return stacks


def accumulate_on_most(config: Config, most: int, least: int | None) -> tuple[int, int] | None:
    """Return `train.accumulate` and the most nodes, where fewer nodes are to take more micro-steps."""
    if least is None:
        return None
    if config.objective.name not in ACCUMULATING:
        print(
            f"note: {config.objective.name} does not go through a batch in micro-steps: on fewer nodes than "
            f"{most} each process holds more images at once",
            file=sys.stderr,
        )
        return None
    return config.train.accumulate, most


def node_range(most: int, least: int | None) -> str:
    """Return sbatch's `--nodes`: one number, or a range."""
    return str(most) if least is None else f"{least}-{most}"


def srun_options(options: Mapping[str, Any] | Sequence[str]) -> list[str]:
    """Return srun's arguments of `launch.srun`: `--name=value` of a mapping, a list as it is.

    true is the option alone, false and null leave it out, and a list is joined with commas.
    """
    if not isinstance(options, Mapping):
        return list(options)
    words = []
    for key, value in options.items():
        flag = f"--{key.lstrip('-').replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif isinstance(value, list):
            words.append(f"{flag}={','.join(map(str, value))}")
        elif value is not False and value is not None:
            words.append(f"{flag}={value}")
    return words


def _sbatch_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of `launch.sbatch`, without those that are false or null. Jobs may be requeued,
    whatever the cluster's default is, unless `requeue` is one of these.
    """
    asked = {"requeue": True, **options}
    if not asked["requeue"]:
        asked["no-requeue"] = True
    return {name: value for name, value in asked.items() if value is not False and value is not None}


def wait_for(job_id: str, run: Path) -> int:
    """Wait until the job, and those that go on after it, have ended; return 0 where the last one completed.

    Args:
        run: the folder of the job's run.
    """
    while True:
        while (state := job_state(job_id)) in _OPEN_STATES:
            time.sleep(_POLL_SECONDS)
        print(f"job {job_id} ended: {state}", flush=True)
        following = next_job(run.resolve() / "slurm", job_id)
        if state == "COMPLETED" or following is None:
            return 0 if state == "COMPLETED" else 1
        job_id = following


def make_executor(config: Config, folder: Path, nodes: str, *, after: str = "", is_dry: bool = False) -> Any:
    """Return submitit's executor of a job.

    Args:
        nodes: sbatch's `--nodes`.
        after: the id of the job that must have ended well before this one starts.
        is_dry: the executor only writes the script, so that SLURM may be missing here.

    Raises:
        MissingLibraryError: submitit is not installed.
    """
    submitit = require("submitit", "submitit", needed_by="--cluster slurm")

    launch = config.launch
    is_range = "-" in nodes
    per_node, cpus = launch.processes_per_node or launch.gpus_per_node or 1, launch.cpus_per_process
    srun = ["--kill-on-bad-exit=1"]
    if cpus or is_range:  # since Slurm 22.05 srun no longer takes it from the job
        srun.append(f"--cpus-per-task={cpus or 1}")
    srun += srun_options(launch.srun)
    recorder = local.recorder_environment(folder.parent) if launch.gpus_per_node else {}
    variables = {**recorder, **launch.environment}
    if launch.snapshot:
        variables |= snapshot_environment(folder.parent)
    exports = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    if is_range:  # what srun starts: the job asks for one task of all these processes' CPUs on each node
        exports.append(f"export SLURM_NTASKS=$((SLURM_JOB_NUM_NODES * {per_node}))")
        exports.append("export SLURM_NPROCS=$SLURM_NTASKS")
        exports.append("export SLURM_NNODES=$SLURM_JOB_NUM_NODES")
        exports.append(f"export SLURM_NTASKS_PER_NODE={per_node}")
    more = {"dependency": f"afterok:{after}", "kill_on_invalid_dep": "yes"} if after else {}
    more |= {"nodes": nodes} if is_range else {}  # over submitit's own, which it counts tasks by
    options: dict[str, Any] = {
        "job_name": config.run.name,
        "nodes": int(nodes.rpartition("-")[2]),
        # with a number of tasks, sbatch counts them on the least number of nodes, and SLURM gives no more
        "ntasks_per_node": None if is_range else per_node,
        "time": max(round(launch.hours * 60), 1),
        "signal_delay_s": launch.signal_seconds,
        "partition": launch.partition,
        "account": launch.account,
        "qos": launch.qos,
        "constraint": launch.constraint,
        "gpus_per_node": launch.gpus_per_node,
        "cpus_per_task": per_node * (cpus or 1) if is_range else cpus,
        "mem": f"{launch.memory_gb}GB" if launch.memory_gb else None,
        "exclusive": launch.exclusive or None,
        "mail_user": launch.mail,
        "mail_type": "END,FAIL,REQUEUE" if launch.mail else None,
        "setup": [*launch.setup, *exports],
        "srun_args": srun,
        "additional_parameters": {**_sbatch_options(launch.sbatch), **more},
    }
    kind = submitit.SlurmExecutor
    if is_dry:  # submitit refuses to make an executor where srun is missing; the script needs none
        kind = type("ScriptWriter", (kind,), {"affinity": classmethod(lambda _: 2)})
    executor = kind(folder=folder)
    executor.update_parameters(**{name: value for name, value in options.items() if value is not None})
    return executor
