"""N "nodes" on this machine: N groups of training processes that meet at a local port.

The same layout and the same environment variables as N real nodes have (those of torchrun), so a run that
works here finds nothing new on a cluster but the network. The processes are started without torchrun's agent:
it turns every exit status into 1, and a preempted run says by its status that it wants to go on.

    start all -> wait -> one failed: stop the others -> killed, hung or preempted: start all again

Knows nothing of training: it starts `selfmask train`.
"""

import contextlib
import math
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from selfmask_dist.common import names
from selfmask_dist.config import Config
from selfmask_dist.runs.exit_status import FAILED, HUNG, REQUEUE, is_echo, is_restartable
from selfmask_dist.runs.folder import run_path

from .restarts import why_not_again

RECORDER_FILE = "TORCH_FR_DUMP_TEMP_FILE"  # what torch calls the place of its flight recorder's dumps

_POLL_SECONDS = 0.05
_GRACE_SECONDS = 3.0  # for the other processes to end by themselves after one has
_LOST_SECONDS = 10.0  # for the process whose loss broke the others to end, with its reason
_STOP_SECONDS = 60.0  # from asking to stop to killing, at least
_AFTER_FORCED_SECONDS = 5.0  # processes end themselves after checkpoint.stop_seconds; who has not is killed
_ONE_STOP_SECONDS = 1.0  # two signals so close are one, which came to a group of processes and was passed on
_DUMP_SECONDS = 1.0
_NUM_TAIL_LINES = 20
_MOST_OWN_LOGS = 64


@dataclass(frozen=True)
class Process:
    """One training process: its place, its command, and variables on top of this process's."""

    rank: int
    node: int
    argv: list[str]
    environment: dict[str, str]

    def __str__(self) -> str:
        settings = [f"{key}={value}" for key, value in self.environment.items()]
        return " ".join([*settings, shlex.join(self.argv)])


def plan_processes(
    config: Config,
    *,
    num_nodes: int,
    train_arguments: Sequence[str],
    restart: int = 0,
    environment: Mapping[str, str] | None = None,
) -> list[Process]:
    """Return every process of the run, by rank.

    Args:
        train_arguments: of `selfmask train`.
        restart: how often the run was started before.
        environment: further variables for every process.

    Raises:
        ValueError: there are fewer GPUs than processes, where each is to have one.
    """
    gpus = [] if config.engine.device == "cpu" else visible_gpus()
    if config.engine.device == "cuda" and not gpus:
        raise ValueError("engine.device is cuda and nvidia-smi lists no GPU here; set engine.device=cpu")
    per_node = config.launch.processes_per_node or max(len(gpus) // num_nodes, 1)
    world_size = num_nodes * per_node
    if gpus and len(gpus) < world_size:
        raise ValueError(
            f"{num_nodes} local node(s) of {per_node} process(es) need a GPU each and there are {len(gpus)}; "
            f"use fewer, or engine.device=cpu"
        )
    port = config.launch.master_port or free_port()
    processes = []
    for rank in range(world_size):
        node, local_rank = divmod(rank, per_node)
        variables = {
            **(recorder_environment(run_path(config)) if gpus else {}),
            **(environment or {}),
            **config.launch.environment,
            "RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_RANK": str(local_rank),
            "LOCAL_WORLD_SIZE": str(per_node),
            "GROUP_RANK": str(node),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "SELFMASK_RESTARTS": str(restart),
            # one thread a process unless asked otherwise: processes share this machine's cores
            "OMP_NUM_THREADS": str(config.engine.threads or os.environ.get("OMP_NUM_THREADS", 1)),
        }
        if gpus:
            share = gpus[node * len(gpus) // num_nodes : (node + 1) * len(gpus) // num_nodes]
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(share)
        argv = [sys.executable, "-m", "selfmask_dist.cli", "train", *train_arguments]
        processes.append(Process(rank, node, argv, variables))
    return processes


def run_processes(
    plan: Callable[[int], Sequence[Process]],
    *,
    logs: Path,
    max_restarts: int = 0,
    stop_seconds: float = 0.0,
) -> int:
    """Run all processes to their end, and return 0 or the exit status of the first that failed.

    SIGTERM and SIGINT stop the run: every process is asked to save and end, a second signal kills.
    SIGUSR2 announces a preemption: the processes save, end, and are started again. No process is left behind.

    Args:
        plan: restart number, from 0 -> the processes.
        logs: folder of what each process prints, `rank-<r>.log`; rank 0's is shown here too.
        max_restarts: after a process was killed or hung. Preemptions are not counted; with 0 there is no
            restart after them either. An error is not restarted, nor is a run whose last starts all failed
            without getting anywhere.
        stop_seconds: how long a process may take to save and end, where that is more than a minute.
    """
    with _Signals() as signals:
        restart, launch = 0, f"{socket.gethostname()} {os.getpid()} {time.time()}"
        while True:
            group = _Group(plan(restart), logs, restart, stop_seconds=stop_seconds)
            try:
                status = group.wait(signals)
            finally:
                group.end()
            if status == 0:
                return 0
            if signals.stop:
                return 128 + signals.stop
            group.report(status)
            if not is_restartable(status):
                return status if status > 0 else 128 - status
            if (reason := why_not_again(logs, launch, status, max_restarts)) is not None:
                print(f"not started again: {reason}", file=sys.stderr)
                return status if status > 0 else 128 - status
            restart += 1
            print(f"restart {restart}", file=sys.stderr, flush=True)


@dataclass
class _Signals:
    """Keeps what this process was told for the waiting loop: signal handlers only take notes."""

    stop: int = 0
    num_stops: int = 0
    last_stop: float = -math.inf
    num_preemptions: int = 0
    _previous: dict[int, object] = field(default_factory=dict)

    def __enter__(self) -> "_Signals":
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
            self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]  # as signal.signal gave it

    def _note(self, signum: int, _frame: FrameType | None) -> None:
        if signum == signal.SIGUSR2:
            self.num_preemptions += 1
        else:
            now = time.monotonic()
            self.num_stops += now - self.last_stop > _ONE_STOP_SECONDS
            self.stop, self.last_stop = signum, now


class _Group:
    """Starts the processes of one start of the run, waits for them and ends them."""

    def __init__(
        self, processes: Sequence[Process], logs: Path, restart: int, *, stop_seconds: float = 0.0
    ) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self._logs = logs
        self._stop_seconds = max(_STOP_SECONDS, stop_seconds + _AFTER_FORCED_SECONDS if stop_seconds else 0.0)
        self._processes = processes
        self._children: list[subprocess.Popen[bytes]] = []
        self._reader: threading.Thread | None = None
        self._failed: Process | None = None
        try:
            for process in processes:
                self._children.append(self._start(process, restart))
        except BaseException:
            self.end()
            raise

    def wait(self, signals: _Signals) -> int:
        """Wait until all have ended or their time is up; return 0, or the status that says why it ended."""
        deadline = float("inf")
        sent_stops = sent_preemptions = 0
        while None in (statuses := [child.poll() for child in self._children]):
            now = time.monotonic()
            if signals.num_stops > sent_stops:  # the first asks, a second one is meant
                deadline = min(deadline, now if sent_stops else now + self._stop_seconds)
                sent_stops = signals.num_stops
                self._send(signal.SIGTERM)
            if signals.num_preemptions > sent_preemptions:
                sent_preemptions = signals.num_preemptions
                self._send(signal.SIGUSR2)
            if any(statuses) and not signals.stop:
                deadline = min(deadline, now + self._seconds_left(statuses))
            if now >= deadline:
                if HUNG in statuses:
                    self._dump_stacks()
                break
            time.sleep(_POLL_SECONDS)
        return self._status(statuses)

    def report(self, status: int) -> None:
        """Print which process ended the run, and the end of its log unless that is on the screen already."""
        if (process := self._failed) is None:
            return
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        print(f"rank {process.rank} on node {process.node} {how}", file=sys.stderr, flush=True)
        if process.rank != 0 and not is_restartable(status):
            path = log_path(self._logs, process.rank)
            lines = path.read_text(errors="replace").splitlines()[-_NUM_TAIL_LINES:]
            print("\n".join([f"the end of {path}:", *lines]), file=sys.stderr, flush=True)

    def end(self) -> None:
        """Leave neither a process nor its children (data loading workers) behind."""
        for child in self._children:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        if self._reader is not None:
            self._reader.join()

    def _start(self, process: Process, restart: int) -> subprocess.Popen[bytes]:
        path = log_path(self._logs, process.rank)
        environment = {**os.environ, **process.environment}
        is_shown = process.rank == 0
        with open(path, "ab") as log:
            log.write(f"---- {time.strftime('%Y-%m-%d %H:%M:%S')} start {restart}\n".encode())
            log.flush()
            if is_shown and sys.stderr.isatty():  # a progress bar needs the terminal itself
                return subprocess.Popen(process.argv, env=environment, start_new_session=True)
            child = subprocess.Popen(
                process.argv,
                env=environment,
                start_new_session=True,  # its own group, with its data loading workers
                stdout=subprocess.PIPE if is_shown else log,
                stderr=subprocess.STDOUT,
            )
        if is_shown:
            self._reader = threading.Thread(target=_copy, args=(child, path), daemon=True)
            self._reader.start()
        return child

    def _dump_stacks(self) -> None:
        """Make the processes that are left, stopped ones too, write to their logs where they are."""
        self._send(signal.SIGABRT)
        self._send(signal.SIGCONT)
        time.sleep(_DUMP_SECONDS)

    def _seconds_left(self, statuses: Sequence[int | None]) -> float:
        """Return how long the others may take once some process has failed."""
        if REQUEUE in statuses:  # all had agreed to save: the others are about to
            return self._stop_seconds
        if all(is_echo(status) for status in statuses if status):
            return _LOST_SECONDS
        return _GRACE_SECONDS  # nobody can save any more: what was committed is what there is

    def _status(self, statuses: Sequence[int | None]) -> int:
        """Return the status that says why the run ended, not that of a peer whose connection it broke."""
        failed = [(s, p) for s, p in zip(statuses, self._processes, strict=True) if s]
        if not failed:  # all are done, or those that are left had their time and are killed
            return -signal.SIGKILL if None in statuses else 0
        failed.sort(key=lambda pair: _rank_of(pair[0]))
        status, self._failed = failed[0]
        return status

    def _send(self, signum: int) -> None:
        for child in self._children:
            if child.poll() is None:
                child.send_signal(signum)


def recorder_file(stacks: Path) -> str:
    """Return what `RECORDER_FILE` is to be for a folder of stacks: torch adds the rank to it."""
    return str(stacks.resolve() / "nccl-rank-")


def recorder_environment(run: Path) -> dict[str, str]:
    """Return the variables by which torch keeps its last collectives, and NCCL dumps them where one fails,
    beside the stacks; what this process's environment says already stays.
    """
    wanted = {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        RECORDER_FILE: recorder_file(run / names.STACKS),
    }
    return {name: value for name, value in wanted.items() if name not in os.environ}


def log_path(logs: Path, rank: int, *, num_ranks: int = 1, per_node: int = 1) -> Path:
    """Return the file that holds what a rank prints.

    Above 64 ranks all of a node share one, `ranks-8-15.log`, but for rank 0: a shared file system bears a
    thousand open files badly.
    """
    if num_ranks <= _MOST_OWN_LOGS or per_node == 1 or rank == 0:
        return logs / f"rank-{rank}.log"
    first = rank // per_node * per_node
    return logs / f"ranks-{first}-{first + per_node - 1}.log"


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if (listed := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [gpu for gpu in listed.split(",") if gpu.strip()]
    if shutil.which("nvidia-smi") is None:
        return []
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    return [str(index) for index, line in enumerate(listing.splitlines()) if line.startswith("GPU ")]


def free_port() -> int:
    """Return a port that is free now; another program may take it before it is used."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rank_of(status: int) -> int:
    """Return a rank for a status: the lower, the more it says about why a run ended."""
    if status == FAILED:
        return 2
    if is_echo(status):
        return 3
    return 0 if is_restartable(status) else 1


def _copy(child: subprocess.Popen[bytes], path: Path) -> None:
    """Copy what the child prints to this process's standard error and to its log."""
    assert child.stdout is not None
    with child.stdout, open(path, "ab", buffering=0) as log:
        for line in child.stdout:
            with contextlib.suppress(OSError):  # a full disk; the child is not to wait for it
                log.write(line)
            sys.stderr.write(line.decode(errors="replace"))
            sys.stderr.flush()
