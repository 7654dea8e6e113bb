"""Commands in fresh processes, and what their ranks hold: anonymous memory, polled from outside.

RssAnon leaves out the pages of files, which the system takes back when memory is short. Should memory run
out, these processes are ended and no others.
"""

import math
import os
import signal
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness import GIB
from tests.support.tiny_run import child_environment, wait_until

KEPT_FREE_GIB = 1.0  # below it what is watched is ended


@dataclass
class Watch(threading.Thread):
    """Polls the anonymous memory of every rank below a process, and ends all of them where memory is short.

    samples: (time, rank, bytes).
    """

    root: int
    samples: list[tuple[float, int, int]] = field(default_factory=list)
    least_available: float = math.inf
    was_short: bool = False

    def __post_init__(self) -> None:
        super().__init__(daemon=True)
        self._ended = threading.Event()

    __hash__ = threading.Thread.__hash__

    def run(self) -> None:
        ranks: dict[int, int] = {}
        looked = 0.0
        while not self._ended.wait(0.01):
            now = time.time()
            if now - looked > 0.25:
                looked, ranks = now, _ranks_below(self.root)
                self.least_available = min(self.least_available, available_bytes())
                if self.least_available < KEPT_FREE_GIB * GIB:
                    self.was_short = True
                    for pid in ranks:
                        _quietly_kill(pid)
            for pid, rank in ranks.items():
                if found := anonymous_bytes(pid):
                    self.samples.append((now, rank, found))

    def finish(self) -> None:
        self._ended.set()
        self.join()

    def peak(
        self, begin: float = 0.0, end: float = math.inf, *, after_lowest: bool = False
    ) -> dict[int, int]:
        """The highest of each rank in a span of time.

        Args:
            after_lowest: from each rank's lowest on: what the stage before held is gone by then.
        """
        series: dict[int, list[int]] = {}
        for moment, rank, found in self.samples:
            if begin <= moment <= end:
                series.setdefault(rank, []).append(found)
        return {
            rank: max(found[found.index(min(found)) :] if after_lowest else found)
            for rank, found in series.items()
        }


def _ranks_below(root: int) -> dict[int, int]:
    """Return the ranks of training processes among the descendants of a process, by process id."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue
    found = {}
    for pid in parents:
        above, levels = pid, 0
        while above in parents and above != root and levels < 8:
            above, levels = parents[above], levels + 1
        if above != root:
            continue
        try:
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            is_ours = b"selfmask_dist.cli" in Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        own = [v for v in variables if v.startswith(b"RANK=")]
        if own and is_ours:
            found[pid] = int(own[0][5:])
    return found


def _quietly_kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def anonymous_bytes(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/status") as lines:
            return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)
    except OSError:
        return 0


def available_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def first_to_go() -> None:
    """Let the system, should memory run out, end this process and no other."""
    Path("/proc/self/oom_score_adj").write_text("1000")


def command(words: list[str], *, stop_when: Any = None) -> tuple[Watch, float, int]:
    """Run a command in fresh processes; returns what was polled, seconds, and its exit status.

    Args:
        stop_when: when it is true, the command gets SIGTERM.
    """
    # what is freed goes back at once, so that memory is what is held
    environment = child_environment(MALLOC_MMAP_THRESHOLD_="65536")
    began = time.perf_counter()
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(
            words, env=environment, stdout=log, stderr=subprocess.STDOUT, preexec_fn=first_to_go
        ) as child,
    ):
        watch = Watch(child.pid)
        watch.start()
        if stop_when is not None:
            wait_until(lambda: child.poll() is not None or stop_when(), 7200)
            child.send_signal(signal.SIGTERM)
        status = child.wait()
        watch.finish()
        if watch.was_short or (status and not (stop_when and status == 128 + signal.SIGTERM)):
            log.seek(0)
            short = f"; less than {KEPT_FREE_GIB:g} GiB were left to the system" if watch.was_short else ""
            tail = log.read().decode(errors="replace")[-6000:]
            raise RuntimeError(f"{' '.join(words)} ended with status {status}{short}:\n{tail}")
    return watch, time.perf_counter() - began, status
