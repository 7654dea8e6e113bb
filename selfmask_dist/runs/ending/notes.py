"""What the processes and the launcher's tasks of one start of a run tell each other as it ends.

    rank-3.77          rank 3 ends with status 77         rank-5.78@gpu12    rank 5, status 78, on node gpu12
    failed, claimed    what the launcher's tasks decided

A note is an empty file whose name says everything: it is there whole or not at all. Shared file systems
remember for up to a minute that a file was "not there"; so nobody asks for a file by its name. The folder is
listed, after a touch whose answer tells this node that the folder has changed, and making a file asks the
server in any case. Imports nothing heavy: launchers read it.
"""

import os
import re
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from selfmask_dist.runs.exit_status import is_restartable

FOLDER_VARIABLE = "SELFMASK_ENDS"  # of the processes that a launcher starts: where they leave their notes
FOLDER_PREFIX = ".ends-"  # of such a folder in the run's logs: one for each start
_END = re.compile(r"rank-(\d+)\.(\d+)(?:@(.+))?")


class EndNotes:
    """The notes of one start of a run, in a folder that all its nodes see."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def tell(self, rank: int, status: int, *, node: str = "") -> None:
        """Say with which status a rank ends (negative for a signal), unless the rank has said so already.

        The process itself says it where it catches its exception, its launcher's task after that.
        """
        if rank in self.statuses():
            return
        status = status if status >= 0 else 128 - status
        self._make(f"rank-{rank}.{status}" + (f"@{node}" if node else ""))

    def statuses(self) -> dict[int, int]:
        """Return the statuses of the ranks that have spoken, 128 + n for a signal."""
        return {rank: status for rank, status, _ in self._ends()}

    def nodes(self, status: int) -> list[str]:
        """Return the nodes of the ranks that ended with a status, each once."""
        return sorted({node for _, found, node in self._ends() if found == status and node})

    def say(self, name: str) -> bool:
        """Leave the note `name`, and return whether this process is the first to do so."""
        return self._make(name)

    def has(self, name: str) -> bool:
        """Return whether anyone left the note `name`."""
        return name in self._names()

    def _ends(self) -> list[tuple[int, int, str]]:
        found = (_END.fullmatch(name) for name in sorted(self._names()))
        return [(int(end[1]), int(end[2]), end[3] or "") for end in found if end is not None]

    def _names(self) -> set[str]:
        with suppress(OSError):  # another user's folder, a full disk: the listing may do without
            os.utime(self.folder)
        try:
            return set(os.listdir(self.folder))
        except OSError:
            return set()

    def _make(self, name: str) -> bool:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self.folder / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        except FileExistsError:
            return False
        except OSError:  # a full disk: the exit status says the same, a little later
            return True
        return True


def failed_ranks(logs: Path) -> dict[int, int]:
    """Return the ranks that ended the last start of a run with an error of their own, and their statuses.

    Args:
        logs: the run's folder of logs, in which each start's notes are.
    """
    starts = sorted(logs.glob(f"{FOLDER_PREFIX}*"), key=lambda path: path.stat().st_mtime)
    statuses = EndNotes(starts[-1]).statuses() if starts else {}
    return {rank: status for rank, status in statuses.items() if status and not is_restartable(status)}


def notes_from(environment: Mapping[str, str]) -> EndNotes | None:
    """Return the notes of the start that this process belongs to; None where its launcher keeps none."""
    folder = environment.get(FOLDER_VARIABLE)
    return EndNotes(Path(folder)) if folder else None


def node_name(environment: Mapping[str, str]) -> str:
    """Return what the cluster calls this node."""
    return environment.get("SLURMD_NODENAME") or socket.gethostname()
