"""One run, one owner: who trains in a folder says so there, and another one is refused while that lives.

    with Claim(folder):      # main rank only; refused with who holds it
        ... owner.json: pid, host, SLURM job, renewed every few seconds, gone at the end ...

On the machine that wrote it the process itself is looked for, so a killed run is free at once. Elsewhere its
heartbeat decides: a run is free `FREE_AFTER_SECONDS` after the last. Launchers read it before they start
anything. Knows nothing of training and imports nothing heavy.
"""

import contextlib
import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from selfmask_dist.common import names
from selfmask_dist.common.files import write_text
from selfmask_dist.common.text import age
from selfmask_dist.runs.exit_status import BAD_INPUT

FREE_AFTER_SECONDS = 60.0  # since the last heartbeat of an owner on another machine
LAUNCHER_VARIABLE = "SELFMASK_LAUNCHER"  # what a launcher on this machine tells its processes of itself
CHAIN_VARIABLE = "SELFMASK_CHAIN"  # what jobs that go on with one run after each other have in common
_RESTART_VARIABLES = ("SELFMASK_RESTARTS", "TORCHELASTIC_RESTART_COUNT")
_RENEW_SECONDS = 5.0
_SETTLE_SECONDS = 0.2  # for another process that took the folder over at the same moment to have written
_ENDED = ("finished", "failed", "lost a process", "preempted")


class RunHeldError(ValueError):
    """Another process trains in the run's folder; the message says which, and when the folder is free."""


def check_free(folder: Path) -> None:
    """Do nothing where nobody trains in a run's folder.

    Raises:
        RunHeldError: a living process does.
    """
    for record in (_read(folder / names.OWNER), _read(folder / names.STATUS)):
        if record and _is_alive(record) and not _is_own(record):
            raise RunHeldError(
                f"{folder} is being trained by {_describe(record)}. Two would mix their checkpoints: stop "
                f"that one first, or set run.name to another name. After a crash on another machine "
                f"a run is free {FREE_AFTER_SECONDS:.0f} s after its last heartbeat"
            )


class Claim:
    """Holds a run's folder between `with` and its end.

    Args:
        exit_process: called where another process has taken the folder over, which it may once this one was
            silent for long enough (stopped, or cut off from the disk).
    """

    def __init__(self, folder: Path, *, exit_process: Callable[[int], Any] = os._exit) -> None:
        self._folder = folder
        self._path = folder / names.OWNER
        self._exit_process = exit_process
        self._record = {**identity(), "launcher": _launcher(), "token": uuid.uuid4().hex}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="owner", daemon=True)

    def __enter__(self) -> Self:
        """Take the folder, which is made where it is not there.

        Raises:
            RunHeldError: another process holds it.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        with _locked(self._folder) as is_locked:
            check_free(self._folder)
            self._write()
        if not is_locked:
            time.sleep(_SETTLE_SECONDS)
            if not self._is_mine():
                check_free(self._folder)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if self._is_mine():
                self._path.unlink()
        with contextlib.suppress(OSError):
            self._folder.rmdir()  # where the run left nothing; else it stays

    def _renew(self) -> None:
        while not self._end.wait(_RENEW_SECONDS):
            other = _read(self._path)
            if other and other.get("token") != self._record["token"]:
                print(f"{self._folder} was taken over by {_describe(other)}; ending", file=sys.stderr)
                self._exit_process(BAD_INPUT)
                return
            with contextlib.suppress(OSError):  # a full disk does not stop a run here
                self._write()

    def _write(self) -> None:
        write_text(self._path, json.dumps({**self._record, "time": time.time()}) + "\n")

    def _is_mine(self) -> bool:
        return _read(self._path).get("token") == self._record["token"]


def launcher_environment() -> dict[str, str]:
    """Return the variable by which processes know the launcher that restarts them: while it lives, the run is
    its own, also between two starts.
    """
    return {LAUNCHER_VARIABLE: json.dumps(_this_process())}


def release(folder: Path) -> None:
    """Forget what processes of this launcher left behind that were killed and are not started again."""
    record = _read(folder / names.OWNER)
    if record.get("launcher") == _this_process():
        with contextlib.suppress(OSError):
            (folder / names.OWNER).unlink()


def num_restarts() -> int:
    """Return how often this run was started before, as its launcher (or torchrun) says."""
    return sum(int(os.environ.get(name, 0)) for name in _RESTART_VARIABLES)


def identity() -> dict[str, Any]:
    """Return which process this is, of which job and start of the run."""
    return {
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "host": socket.gethostname(),
        "machine": _machine(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "chain": os.environ.get(CHAIN_VARIABLE) or os.environ.get("SLURM_JOB_ID"),
        "restarts": num_restarts(),
    }


def _launcher() -> Any:
    try:
        return json.loads(os.environ.get(LAUNCHER_VARIABLE, "null"))
    except ValueError:
        return None


def _is_own(record: dict[str, Any]) -> bool:
    """Return whether this process, or the launcher or job that started it again, wrote a record."""
    own = identity()
    if record.get("pid") == own["pid"] and _is_here(record):
        return True
    if _is_here(record) and _lives(record.get("pid"), record.get("started")):
        return False  # whoever started it: two at once are one too many
    if record.get("launcher") is not None and record["launcher"] == _launcher():
        return True
    restarts = record.get("restarts")
    is_later = isinstance(restarts, int) and own["restarts"] > restarts
    chain = record.get("chain", record.get("job"))
    return own["chain"] is not None and chain == own["chain"] and is_later


def _this_process() -> list[Any]:
    return [os.getpid(), _started(os.getpid()), _machine()]


def _is_alive(record: dict[str, Any]) -> bool:
    """Return whether who wrote a record trains still: by its process here, by its heartbeat elsewhere."""
    if record.get("state") in _ENDED:
        return False
    launcher = record.get("launcher")
    if isinstance(launcher, list) and len(launcher) == 3:
        pid, started, machine = launcher
        if machine == _machine() and _lives(pid, started):
            return True
    if _is_here(record):
        return _lives(record.get("pid"), record.get("started"))
    written = record.get("time")
    return isinstance(written, int | float) and time.time() - written < FREE_AFTER_SECONDS


def _is_here(record: dict[str, Any]) -> bool:
    """Return whether a record's process would be seen here; the heartbeat's names the host alone."""
    if "machine" in record:
        return bool(record["machine"] == _machine())
    return record.get("host") == socket.gethostname()


def _lives(pid: Any, started: Any = None) -> bool:
    """Return whether a process of this machine is there; a later one of the same number is another one."""
    if not isinstance(pid, int) or pid < 1:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # another user's
    if _state(pid)[:1] == ["Z"]:  # ended, and not yet waited for
        return False
    return started is None or _started(pid) in (None, started)


def _started(pid: int) -> int | None:
    """Return when a process began, in ticks since the machine did; None where the system does not say."""
    fields = _state(pid)
    return int(fields[19]) if len(fields) > 19 else None


def _state(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the process's state on; none where there is no such file."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _machine() -> str:
    """Return what tells this start of this machine, and this container's view of it, from others."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _describe(record: dict[str, Any]) -> str:
    parts = [f"process {record.get('pid', '?')} on {record.get('host', 'an unknown host')}"]
    if record.get("job"):
        parts.append(f"SLURM job {record['job']}")
    if isinstance(launcher := record.get("launcher"), list) and launcher:
        parts.append(f"launcher {launcher[0]}")
    written = record.get("time")
    if isinstance(written, int | float):
        parts.append(f"heartbeat {age(time.time() - written)} ago")
    return ", ".join(parts)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Keep other processes out while the owner is read and written; gives False where that cannot be."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            is_locked = True
        except OSError:  # a file system without locks, or one that has none for folders
            is_locked = False
        yield is_locked
    finally:
        os.close(descriptor)


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
