"""After an error a process of a run is gone within seconds, and waits for nobody.

    exception caught -> note for the launcher, deadline starts -> traceback -> group aborted -> os._exit

Nothing may wait for peers that are gone: not `destroy_process_group`, not the destructors of an interpreter
that shuts down. The deadline is a thread; behind it stands faulthandler's, which needs no interpreter.
"""

import faulthandler
import os
import sys
import threading
import time
import traceback
from contextlib import suppress
from typing import NoReturn

from selfmask_dist.data import NetworkLostError, WorkerLostError
from selfmask_dist.parallel import is_lost_peer
from selfmask_dist.runs.ending.device_fault import device_status
from selfmask_dist.runs.ending.notes import node_name, notes_from
from selfmask_dist.runs.exit_status import DEVICE, FAILED, LOST, REQUEUE, plain_status
from selfmask_dist.runs.preempt import Preempted

SECONDS = 6.0  # from an error to the end, whatever the process is doing; metrics and wandb are closed in it
_LAST_SECONDS = 3.0  # after that, where even the deadline's thread cannot run
_MAX_CAUSES = 5


def is_lost_process(error: BaseException) -> bool:
    """Return whether an error only says that another process is gone, or the network, which may pass."""
    if _device_status(error) is not None:  # NCCL wraps what CUDA said of this process's own device
        return False
    return isinstance(error, WorkerLostError | NetworkLostError) or is_lost_peer(error)


def status_of(error: BaseException) -> int:
    """Return the exit status of a process that an error ends."""
    if isinstance(error, Preempted):
        return REQUEUE
    if isinstance(error, KeyboardInterrupt):
        return 130
    if (status := _device_status(error)) is not None:
        return status
    if is_lost_process(error):
        return LOST
    plain = plain_status(error)
    return FAILED if plain is None else plain


def _device_status(error: BaseException) -> int | None:
    """Return what CUDA's or NCCL's words in an error, or in what caused it, say of the device; else None."""
    cause: BaseException | None = error
    for _ in range(_MAX_CAUSES):
        if cause is None:
            break
        # torch.AcceleratorError, DistBackendError, and what a thread of a loader raises again: all of them
        # are RuntimeErrors, and CUDA's first set-up raises a plain one
        if isinstance(cause, RuntimeError) and (status := device_status(str(cause))) is not None:
            return status
        cause = cause.__cause__
    return None


class Departure:
    """How this process leaves after an error. It does nothing until it is armed, by `selfmask train` in a run
    of several processes: a test or a notebook that trains goes on after an error.
    """

    def __init__(self, *, seconds: float = SECONDS) -> None:
        self._seconds = seconds
        self._is_armed = False
        self._error: BaseException | None = None
        self._deadline = 0.0
        self._is_told = False  # the traceback is printed
        self._lock = threading.Lock()

    def arm(self) -> None:
        """Make errors end this process, where it is one of several."""
        self._is_armed = os.environ.get("WORLD_SIZE", "1") != "1"

    @property
    def is_armed(self) -> bool:
        """Whether `leave` is how this process ends."""
        return self._is_armed

    def note(self, error: BaseException) -> None:
        """Say at once with which status this process will end, and start the deadline.

        To be called where an exception is caught first that nobody goes on after; once more does no harm.
        """
        if not self._is_armed or isinstance(error, Preempted) or self._error is not None:
            return
        self._error, self._deadline = error, time.monotonic() + self._seconds
        notes = notes_from(os.environ)
        threading.Thread(target=self._end_in_time, name="departure", daemon=True).start()
        faulthandler.dump_traceback_later(self._seconds + _LAST_SECONDS, exit=True)
        if notes is not None:
            status = status_of(error)
            node = node_name(os.environ) if status == DEVICE else ""
            notes.tell(int(os.environ.get("RANK", 0)), status, node=node)

    def tell(self, error: BaseException, message: str = "") -> None:
        """Print an error's traceback, or the message that stands for it, once."""
        with self._lock:
            if not self._is_told:
                self._is_told = True
                print(message or "".join(traceback.format_exception(error)).rstrip(), file=sys.stderr)
                _flush()

    def leave(self, status: int) -> NoReturn:
        """End this process, its group being aborted already, by `join_world`. A checkpoint that a thread is
        writing has the time until the deadline.
        """
        for thread in threading.enumerate():
            is_own = thread in (threading.current_thread(), threading.main_thread())
            if not is_own and not thread.daemon:  # such as Python would wait for, without end
                thread.join(max(self._deadline - time.monotonic(), 0.0))
        _flush()
        os._exit(status)

    def _end_in_time(self) -> None:
        time.sleep(self._seconds)
        assert self._error is not None
        self.tell(self._error)
        os._exit(status_of(self._error))


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # closed, full, or none at all
            stream.flush()


departure = Departure()
