"""SLURM jobs that were submitted for a run, which has no other file before they start.

    launcher: note_jobs(folder, ["12", "13"])    `selfmask status`, preflight: waiting_job(folder)

Knows nothing of training and imports nothing heavy.
"""

import json
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from selfmask_dist.common import names
from selfmask_dist.common.files import write_json

_SECONDS = 10.0  # for squeue to answer
_WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT")


def note_jobs(folder: Path, jobs: Sequence[str]) -> None:
    """Write down which jobs are to make the run of a folder."""
    write_json(folder / names.SUBMITTED, {"jobs": list(jobs), "time": time.time()})


def waiting_job(folder: Path) -> str | None:
    """Return the first job of a run, where it waits for its turn; None where none does.

    Without squeue, as on another machine, nobody knows: a run that has not begun is then taken to wait.
    """
    jobs = _jobs(folder)
    if not jobs:
        return None
    if shutil.which("squeue") is None:
        return None if (folder / names.CONFIG).exists() else jobs[0]
    command = ["squeue", "--noheader", "--states=all", f"--jobs={','.join(jobs)}", "--format=%i %T"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None if (folder / names.CONFIG).exists() else jobs[0]
    states = [line.split() for line in done.stdout.splitlines()]
    if any(state[1:] == ["RUNNING"] for state in states):
        return None  # later parts of a cascade wait for the one that runs
    return next((state[0] for state in states if len(state) == 2 and state[1] in _WAITING), None)


def _jobs(folder: Path) -> list[str]:
    try:
        value = json.loads((folder / names.SUBMITTED).read_text())
        return [str(job) for job in value["jobs"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
