"""Is it worth starting a run once more after a failure? Not where the last few starts all failed and left
nothing new.

A process that is killed, hangs or loses its peers is started again, since that mostly passes; a run that
never fits into memory would go on so until `launch.max_restarts`. Knows a run's folder by its files.
"""

import contextlib
import hashlib
import json
from pathlib import Path

MAX_FRUITLESS = 5  # starts in a row that failed without leaving anything
# what a run or a stage of a cascade leaves behind as it goes on
_PATTERNS = (
    *("checkpoints/step-*", "*/checkpoints/step-*", "*.mask", "*/*.mask"),
    *("embeddings/*/*/*", "measuring/*/*/*", "*/measuring/*/*/*"),
)


def is_fruitless(logs: Path, start: str) -> bool:
    """Take note of a failed start. Return whether `MAX_FRUITLESS` starts in a row have left nothing new.

    Args:
        logs: the folder in the run's folder, where the note is kept.
        start: the job or launcher; another one counts anew.
    """
    note, run = logs / ".failures.json", logs.parent
    names = sorted(str(path.relative_to(run)) for pattern in _PATTERNS for path in run.glob(pattern))
    state = {"start": start, "files": hashlib.sha256("\n".join(names).encode()).hexdigest()}
    count = 1
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        before = json.loads(note.read_text())
        if all(before[key] == value for key, value in state.items()):
            count = before["count"] + 1
    with contextlib.suppress(OSError):  # a full disk is no reason to give up
        note.write_text(json.dumps({**state, "count": count}) + "\n")
    return count >= MAX_FRUITLESS
