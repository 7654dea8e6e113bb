"""Finding the newest valid checkpoint: verified by all processes together, the same one for all.

opened = open_newest(folder, peers=...)    every byte hashed once, by one of them; nothing is held
load_newest(folder)                        whole tensors, for one process that looks at them
"""

from collections.abc import Callable
from pathlib import Path

from selfmask_dist.runs.checkpoint.folder import (
    CheckpointError,
    committed,
    read_manifest,
    rename_invalid,
    verify,
)
from selfmask_dist.runs.checkpoint.format_1 import OpenFormat1
from selfmask_dist.runs.checkpoint.peers import Peers
from selfmask_dist.runs.checkpoint.reading import Checkpoint, OpenCheckpoint


def open_checkpoint(path: Path) -> OpenCheckpoint:
    """Open a checkpoint of any format that is read. Its tensors are not verified.

    Raises:
        CheckpointError: it cannot be opened.
    """
    if read_manifest(path)["format"] == 1:
        return OpenFormat1(path)
    return OpenCheckpoint(path)


def open_newest(
    folder: Path,
    *,
    peers: Peers | None = None,
    report: Callable[[str], None] = print,
    set_aside: bool = True,
) -> OpenCheckpoint | None:
    """Return the newest valid checkpoint, None where there is none. Collective: every rank must call.

    Each byte is hashed once, by one process, and all take the same one. Invalid ones are renamed and reported
    by the main rank.
    """
    peers = peers or Peers()
    for name in peers.from_main(lambda: [path.name for path in committed(folder)]):
        path = folder / name
        opened, problems = _open_verified(path, peers.rank, peers.size)
        all_problems = list(dict.fromkeys(one for found in peers.share(problems) for one in found))
        if opened is not None and not all_problems:
            return opened
        if peers.is_main:
            report(f"checkpoint {name} is not used: {'; '.join(all_problems)}")
            if set_aside:
                rename_invalid(path, report)
    return None


def load_newest(
    folder: Path, *, report: Callable[[str], None] = print, set_aside: bool = True
) -> tuple[Checkpoint, Path] | None:
    """Return the newest valid checkpoint whole, and where it is, for one process that looks at it; None where
    there is none. Invalid ones are renamed and reported.
    """
    opened = open_newest(folder, report=report, set_aside=set_aside)
    return None if opened is None else (opened.whole(), opened.path)


def read_checkpoint(path: Path) -> Checkpoint:
    """Verify a checkpoint and return it whole. Raises CheckpointError naming the file that is damaged."""
    opened, problems = _open_verified(path, 0, 1)
    if opened is None or problems:
        raise CheckpointError("; ".join(problems))
    return opened.whole()


def _open_verified(path: Path, rank: int, size: int) -> tuple[OpenCheckpoint | None, list[str]]:
    """Open a checkpoint and verify this process's share of its bytes."""
    if problems := verify(path, rank=rank, size=size):
        return None, problems
    try:
        return open_checkpoint(path), []
    except CheckpointError as error:
        return None, [str(error)]
