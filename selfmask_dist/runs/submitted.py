"""SLURM jobs that were submitted for a run, which has no other file before they start.

    launcher: note_jobs(folder, ["12", "13"])    `selfmask status`, preflight: waiting(folder)

Knows nothing of training and imports nothing heavy.
"""

import json
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from selfmask_dist.common import names
from selfmask_dist.common.files import write_json
from selfmask_dist.common.text import age

_SECONDS = 10.0  # for squeue to answer
_WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT")


def note_jobs(folder: Path, jobs: Sequence[str]) -> None:
    """Write down which jobs are to make the run of a folder."""
    write_json(folder / names.SUBMITTED, {"jobs": list(jobs), "time": time.time()})


@dataclass(frozen=True)
class Waiting:
    """A job that waits for its turn: why, as SLURM says it (else ""), and since when (seconds)."""

    job: str
    reason: str
    since: float | None

    def __str__(self) -> str:
        reason = f" ({self.reason})" if self.reason else ""
        since = "" if self.since is None else f", since {age(max(time.time() - self.since, 0.0))}"
        return f"waits in SLURM as job {self.job}{reason}{since}"


def waiting_job(folder: Path) -> str | None:
    """Return the first job of a run, where it waits for its turn; None where none does."""
    found = waiting(folder)
    return None if found is None else found.job


def waiting(folder: Path) -> Waiting | None:
    """Return the first job of a run that waits for its turn, and None where none does.

    Without squeue, as on another machine, nobody knows: a run that has not begun is then taken to wait since
    it was submitted.
    """
    jobs, submitted = _jobs(folder)
    if not jobs:
        return None
    unknown = None if (folder / names.CONFIG).exists() else Waiting(jobs[0], "", submitted)
    if shutil.which("squeue") is None:
        return unknown
    command = ["squeue", "--noheader", "--states=all", f"--jobs={','.join(jobs)}", "--format=%i %T %V %r"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return unknown
    lines = [line.split(maxsplit=3) for line in done.stdout.splitlines()]
    if any(line[1:2] == ["RUNNING"] for line in lines):
        return None  # later parts of a cascade wait for the one that runs
    for job, state, *more in (line for line in lines if len(line) > 1):
        if state in _WAITING:
            reason = more[1] if len(more) > 1 and more[1] != "None" else ""
            return Waiting(job, reason, _seconds(more[0]) if more else submitted)
    return None


def _seconds(text: str) -> float | None:
    """Return SLURM's local time, `2026-11-30T10:00:00`, in seconds; None for `N/A`."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


def _jobs(folder: Path) -> tuple[list[str], float | None]:
    """Return the jobs that were submitted for a run, and when."""
    try:
        value = json.loads((folder / names.SUBMITTED).read_text())
        return [str(job) for job in value["jobs"]], float(value["time"])
    except (OSError, ValueError, KeyError, TypeError):
        return [], None
