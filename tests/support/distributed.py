"""`run_distributed(fn, world_size=2)`: a function in real processes that form a process group.

The processes are forked from one server process that has imported torch and the project once
(multiprocessing's forkserver), so a call takes a fraction of a second instead of fresh imports for each rank,
and leaves nothing behind for the next. A failing rank is reported with its own traceback, a rank that hangs
with the place where it hangs.
No process outlives the call; should the caller itself be killed, each rank ends when its time is up.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

# Imported once in the server, as each takes a rank 0.3 to 2 s: what nearly every run needs, though the
# project imports it late, and libraries where the calling process has them.
ALWAYS = (
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "torchvision",
    "timm",
    "deepspeed",
    "torch._inductor.compile_fx",  # deepspeed imports it when it starts
)
WHERE_LOADED = (
    "open_clip",
    "sklearn.cluster",
    "sklearn.datasets",
    "sklearn.linear_model",
    "sklearn.manifold",
    "sklearn.mixture",
    "matplotlib.pyplot",
    "pytest",
)
ROOT = Path(__file__).resolve().parents[2]
GRACE_S = 1.0  # after a rank failed, time for the others to say what they have to say


class DistributedError(RuntimeError):
    """A rank raised, died or hung; the message holds its traceback."""


def run_distributed(
    fn: Callable[..., Any],
    world_size: int = 2,
    *args: Any,
    timeout: float = 60.0,
    backend: str = "gloo",
    env: Mapping[str, str] | None = None,
) -> list[Any]:
    """Call `fn(*args)` in `world_size` processes that form a process group; what each returned, by rank.

    Args:
        fn: a function at the top level of a module; `torch.distributed` tells it its rank, and so do the
            usual environment variables (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT).
        args: the same for every rank; pickled, as the answers are.
        timeout: seconds for the whole call.
        backend: of the process group; "" makes none, for code that makes its own from the environment.
        env: environment variables for the ranks on top of the caller's.

    Raises:
        DistributedError: some rank raised, died or did not end in time.
    """
    job = pickle.dumps((fn, args))
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # port 0: any free one
    shared_env = {
        **os.environ,
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # env:// then joins the store above as a client
        "OMP_NUM_THREADS": "1",
    }
    if sys.platform == "linux":
        shared_env["GLOO_SOCKET_IFNAME"] = "lo"  # the machine's own name need not resolve
    deadline = time.monotonic() + timeout
    ranks: list[_Rank] = []
    with tempfile.TemporaryDirectory(prefix="run_distributed_") as folder:
        try:
            for rank in range(world_size):
                rank_env = {**shared_env, "RANK": str(rank), "LOCAL_RANK": str(rank), **(env or {})}
                ranks.append(_Rank(rank, Path(folder) / str(rank), (job, rank_env, deadline, backend)))
            _collect(ranks, deadline)
        finally:
            for process in ranks:
                process.end()
        for process in ranks:
            print(f"[{process.name}]\n{process.log()}" if process.log() else "", end="")
    failures = [process.failure for process in ranks if process.failure]
    if failures:
        raise DistributedError("\n".join(failures))
    return [process.value for process in ranks]


def _server() -> multiprocessing.context.ForkServerContext:
    """Return the context whose server process is running."""
    context = multiprocessing.get_context("forkserver")
    ours = [name for name in sys.modules if name.startswith("selfmask_dist.")]
    heavy = [name for name in WHERE_LOADED if name.partition(".")[0] in sys.modules]
    context.set_forkserver_preload([*ALWAYS, *heavy, *ours])
    with (
        pytest.MonkeyPatch.context() as patch
    ):  # the server must find this checkout, and not an installed one
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        forkserver.ensure_running()
    return context


class _Rank:
    """The caller's side of one process."""

    def __init__(self, rank: int, log_path: Path, work: tuple[bytes, dict[str, str], float, str]) -> None:
        context = _server()
        self.name = f"rank {rank}"
        self.value: Any = None
        self.failure = ""
        self.is_done = False
        self.log_path = log_path
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, str(log_path), *work), name=self.name)
        self.process.start()
        theirs.close()

    def receive(self, deadline: float) -> None:
        """Take the answer, or what the process left when it ended without one."""
        self.is_done = True
        try:
            is_good, payload = pickle.loads(self.connection.recv_bytes())
        except EOFError:
            self.process.join(GRACE_S)
            how = "hangs" if time.monotonic() >= deadline else f"died with exit code {self.process.exitcode}"
            self.failure = f"{self.name} {how}:\n{self.log()}"
            return
        if is_good:
            self.value = payload
        else:
            self.failure = f"{self.name} failed:\n{payload}"

    def log(self) -> str:
        """What the process printed, with the stacks of all its threads if it hung or crashed."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def end(self) -> None:
        """Leave neither the process nor its children (data loading workers) behind."""
        self.connection.close()  # for a rank with nothing left to do, the sign to go
        if self.is_done and not self.failure:
            self.process.join(5.0)
        if self.process.exitcode is None and self.process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.kill()  # one that has not made its group yet
        self.process.join()


def _collect(ranks: list[_Rank], deadline: float) -> None:
    """Wait for every answer; stop early, but not at once, when some rank fails."""
    limit = deadline + GRACE_S  # at the deadline a rank writes down where it hangs and ends by itself
    while open_ranks := {rank.connection: rank for rank in ranks if not rank.is_done}:
        ready = wait(list(open_ranks), timeout=max(0.0, limit - time.monotonic()))
        for connection in ready:
            rank = open_ranks[connection]  # type: ignore[index]  # only connections were given
            rank.receive(deadline)
            if rank.failure:
                limit = min(limit, time.monotonic() + GRACE_S)
        if not ready and time.monotonic() >= limit:
            if not any(rank.failure for rank in ranks):
                for rank in open_ranks.values():
                    rank.failure = f"{rank.name} gave no sign of life before its time was up:\n{rank.log()}"
            return


def _work(
    connection: Connection, log_path: str, job: bytes, env: dict[str, str], deadline: float, backend: str
) -> None:
    """What runs in the process of a rank."""
    os.setsid()  # a group of its own, so that its children can be ended with it
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    faulthandler.enable(file=2)
    faulthandler.dump_traceback_later(max(0.01, deadline - time.monotonic()), exit=True, file=2)
    os.environ.clear()
    os.environ.update(env)
    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (the global state is the one to seed)
    torch.manual_seed(0)
    try:
        fn, args = pickle.loads(job)
        if backend:
            _join_group(backend, deadline)
        answer = pickle.dumps((True, fn(*args)))
    except BaseException:
        answer = pickle.dumps((False, traceback.format_exc()))
    sys.stdout.flush()
    sys.stderr.flush()
    connection.send_bytes(answer)
    faulthandler.cancel_dump_traceback_later()
    # Leaving earlier would close the sockets under the other ranks, and bury the first error under theirs.
    with contextlib.suppress(EOFError, OSError):
        connection.recv_bytes()
    if dist.is_initialized():
        dist.destroy_process_group()


def _join_group(backend: str, deadline: float) -> None:
    # twice the time that is left: a hang shall end with the stacks of all ranks, not with a timeout in one
    timeout = timedelta(seconds=2 * max(1.0, deadline - time.monotonic()))
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world_size, False, timeout
    )
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
