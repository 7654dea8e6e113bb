"""Being asked to stop: USR2 or TERM on any rank, agreed on by all of them, and a forced exit behind it.

    signal -> `requested` on that rank -> summed over ranks with the loss, every step -> save -> `Preempted`

Signals are taken from a pipe by a thread of its own: a rank that waits in a collective hears them too. Knows
nothing of SLURM, checkpoints or training.
"""

import faulthandler
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from selfmask_dist.runs.exit_status import REQUEUE

_CHECK_SECONDS = 1.0  # between two checks of the watched file
SIGNALS = (signal.SIGUSR2, signal.SIGTERM)


class Preempted(Exception):  # noqa: N818 (not an error)
    """All ranks agreed to stop; raised on every one of them at the same place."""

    is_agreed = True  # so `join_world` leaves the group in peace


class StopRequest:
    """Listens between `with` and its end; only in the main thread.

    Args:
        force_after: seconds from the first signal to an exit with REQUEUE, whatever the process is doing;
            the stacks of all threads are written to `stacks` before.
    """

    def __init__(
        self,
        *,
        force_after: float = 0.0,
        stacks: Path | None = None,
        exit_process: Callable[[int], Any] = os._exit,
    ) -> None:
        self.reason = ""
        self._watched: Path | None = None
        self._checked = 0.0
        self._force_after = force_after
        self._stacks = stacks
        self._exit_process = exit_process
        self._previous: dict[signal.Signals, Any] = {}
        self._timer: threading.Timer | None = None

    @property
    def requested(self) -> bool:
        """Whether this rank was asked. The others may not know: agree before acting on it."""
        if (
            not self.reason
            and self._watched is not None
            and time.monotonic() - self._checked > _CHECK_SECONDS
        ):
            self._checked = time.monotonic()
            if self._watched.exists():
                self.reason = "the stop of another group of processes"
                self._start_timer()
        return bool(self.reason)

    def watch(self, path: Path | None) -> None:
        """Take the file `path`, once it exists, for a signal: how groups that share no step tell each
        other."""
        self._watched = path

    def __enter__(self) -> Self:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._previous_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for signum in SIGNALS:
            self._previous[signum] = signal.signal(signum, lambda *_: None)  # the pipe tells the thread
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(self._previous_fd)
        self._writer.close()
        self._thread.join()
        self._reader.close()
        if self._timer is not None:
            self._timer.cancel()

    def _listen(self) -> None:
        while received := self._reader.recv(64):
            for number in received:
                if number in SIGNALS and not self.requested:
                    self.reason = signal.Signals(number).name
                    self._start_timer()

    def _start_timer(self) -> None:
        if self._force_after:
            self._timer = threading.Timer(self._force_after, self._force)
            self._timer.daemon = True
            self._timer.start()

    def _force(self) -> None:
        print(
            f"not stopped {self._force_after:g} s after {self.reason}: ending without saving",
            file=sys.stderr,
            flush=True,
        )
        if self._stacks is not None:
            dump_stacks(self._stacks, f"forced exit after {self.reason}")
        self._exit_process(REQUEUE)


def dump_stacks(path: Path, reason: str) -> None:
    """Append what every thread of this process is doing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as stream:
        stream.write(f"---- {reason}, process {os.getpid()}\n")
        stream.flush()
        faulthandler.dump_traceback(stream, all_threads=True)
