"""Is it worth starting a run once more? Not after `launch.max_restarts` failures, nor where the last few
starts left nothing new.

A process that is killed, hangs or loses its peers is started again, since that mostly passes; a run that
never fits into memory would go on so for ever. Being asked to stop (a preemption, a time limit) is no failure
and is not counted; only a run that is stopped so often without anything new is given up. Knows a run's folder
by its files.
"""

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

from selfmask_dist.runs.exit_status import REQUEUE

MAX_FRUITLESS = 5  # starts in a row that failed without leaving anything
MAX_STOPPED = 50  # starts in a row that were told to stop, or failed, before they left anything
# what a run or a stage of a cascade leaves behind as it goes on
_PATTERNS = (
    *("checkpoints/step-*", "*/checkpoints/step-*", "*.mask", "*/*.mask"),
    *("embeddings/*/*/*", "measuring/*/*/*", "*/measuring/*/*/*"),
)


def why_not_again(logs: Path, start: str, status: int, max_restarts: int) -> str | None:
    """Take note of how a start ended, and return why the run is not worth another one; None where it is.

    Args:
        logs: the folder in the run's folder, where the note is kept.
        start: the job, chain of jobs or launcher; another one counts anew.
        status: the start's exit status, one that may be restarted.
        max_restarts: after failures; 0: none, and none after a preemption either.
    """
    note, run = logs / ".failures.json", logs.parent
    names = sorted(str(path.relative_to(run)) for pattern in _PATTERNS for path in run.glob(pattern))
    files = hashlib.sha256("\n".join(names).encode()).hexdigest()
    before = _read(note)
    failures, fruitless, stopped = 0, 0, 0
    if before.get("start") == start:
        failures = before.get("failures", 0)
        if before.get("files") == files:
            fruitless, stopped = before.get("fruitless", 0), before.get("stopped", 0)
    if status == REQUEUE:
        stopped += 1
    else:
        failures, fruitless, stopped = failures + 1, fruitless + 1, stopped + 1
    counts = {"failures": failures, "fruitless": fruitless, "stopped": stopped}
    with contextlib.suppress(OSError):  # a full disk is no reason to give up
        note.write_text(json.dumps({"start": start, "files": files, **counts}) + "\n")
    if max_restarts == 0:
        return "launch.max_restarts is 0"
    if failures > max_restarts:
        return f"{failures - 1} restarts after failures were launch.max_restarts"
    if fruitless >= MAX_FRUITLESS:
        return f"{MAX_FRUITLESS} starts in a row came to nothing"
    if stopped >= MAX_STOPPED:
        return (
            f"{MAX_STOPPED} starts in a row were told to stop before they left anything new; give it more "
            f"time (launch.hours), or save more often (checkpoint.every_minutes)"
        )
    return None


def _read(note: Path) -> dict[str, Any]:
    try:
        value = json.loads(note.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
