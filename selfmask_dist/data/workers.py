"""The loader's workers: processes forked from a server, or threads that compute ahead.

Knows neither batches nor sources. Workers are forked from a small server process. Not "fork": by then the
parent runs gloo's, CUDA's and OpenMP's threads, whose locks a forked child inherits in any state (deadlocks;
Python 3.12 warns of it). Not "spawn": every worker would import torch again, 3 s each, and torch's workers
abort when they end that way.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Literal, TypeVar

from torch.utils.data import DataLoader

WorkerKind = Literal["process", "thread"]
START_METHOD = "forkserver"
# what every worker needs, imported once by the server
_PRELOAD = ["__main__", "torch", "PIL.Image", "selfmask_dist.data.loader"]
T = TypeVar("T")
P = TypeVar("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Workers:
    """What decodes pictures beside this process. Changes no pixel.

    num: processes or threads for each rank; 0 decodes when a batch is asked for. At most two batches of each
        wait to be taken.
    kind: processes import the main script again, which so needs its `if __name__ == "__main__":`.
    pin_memory: put batches into page-locked memory, from which copies to a GPU overlap with computing.
    """

    num: int = 0
    kind: WorkerKind = "process"
    pin_memory: bool = False

    def __post_init__(self) -> None:
        if self.num < 0:
            raise ValueError(f"the number of data workers is {self.num}; it must be 0 or above")


class WorkerLostError(RuntimeError):
    """A data loading worker ended by itself, most likely killed for want of memory."""


def start_worker_server() -> None:
    """Start the process that workers are forked from; it imports torch while the caller builds its model."""
    multiprocessing.forkserver.set_forkserver_preload(_PRELOAD)
    # blocked in it and in its workers: clusters send these to every process, and the parent is to answer
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGUSR2, signal.SIGTERM))
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def die_with_parent(worker: int) -> None:
    """Make a new worker, in which this runs, leave when the training process is gone, however that went.

    torch's workers watch their parent process, which is the server here, and the server lives as long as one
    of its workers. Without this a rank that is killed leaves them all behind for ever.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, worker

    def wait() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def without_worker_advice() -> Iterator[None]:
    """Silence torch's advice on more workers than cores: each rank would repeat it and counts only itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        yield


def ahead(fn: Callable[[P], R], plans: Iterable[P], *, num_threads: int) -> Iterator[R]:
    """Yield `fn(plan)` for each plan, in order, computed by threads.

    At most `2 * num_threads` results are in the making or wait to be taken: a slow consumer holds the
    threads up, and memory stays bounded. An error in `fn` is raised in its turn; closing the iterator ends
    the threads.
    """
    remaining = iter(plans)
    with ThreadPoolExecutor(num_threads, thread_name_prefix="selfmask-data") as pool:
        waiting: deque[Future[R]] = deque(
            pool.submit(fn, plan) for plan in islice(remaining, 2 * num_threads)
        )
        try:
            while waiting:
                yield waiting.popleft().result()
                waiting.extend(pool.submit(fn, plan) for plan in islice(remaining, 1))
        finally:
            pool.shutdown(cancel_futures=True)


def naming_lost_workers(loader: DataLoader[T]) -> Iterator[T]:
    """Yield a loader's batches.

    Raises WorkerLostError where torch says only that a worker exited unexpectedly, or that a tensor whose
    sender is gone cannot be received.
    """
    try:
        yield from loader
    except (RuntimeError, EOFError, OSError) as error:
        workers = getattr(getattr(loader, "_iterator", None), "_workers", [])
        for worker in workers:
            worker.join(timeout=0.1)  # it may be about to be known
        is_told = isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid")
        if not is_told and not any(worker.exitcode for worker in workers):
            raise
        codes = sorted({worker.exitcode for worker in workers if worker.exitcode})
        how = ", ".join(signal.Signals(-code).name if code < 0 else f"status {code}" for code in codes)
        raise WorkerLostError(
            f"a data loading worker ended by itself ({how or 'how is not known'}), most likely "
            f"out of memory: lower engine.workers, or ask for more (launch.memory_gb)"
        ) from error
