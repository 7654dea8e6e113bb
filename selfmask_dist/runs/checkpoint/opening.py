"""Finding the newest valid checkpoint: verified by all processes together, the same one for all.

opened = open_newest(folder, peers=...)    every byte hashed once, by one of them; nothing is held
open_newest(..., verify_later=True)        bytes are verified as they are read: load, then opened.confirm()
load_newest(folder)                        whole tensors, for one process that looks at them
"""

from collections.abc import Callable, Collection
from pathlib import Path

from selfmask_dist.runs.checkpoint.folder import (
    CheckpointError,
    committed,
    read_manifest,
    rename_invalid,
    verify,
    verify_outline,
)
from selfmask_dist.runs.checkpoint.format_1 import OpenFormat1
from selfmask_dist.runs.checkpoint.peers import Peers
from selfmask_dist.runs.checkpoint.reading import Checkpoint, OpenCheckpoint
from selfmask_dist.runs.checkpoint.watching import ReadingWatch


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
    verify_later: bool = False,
    skip: Collection[Path] = (),
) -> OpenCheckpoint | None:
    """Return the newest valid checkpoint, None where there is none. Collective: every rank must call.

    Each byte is hashed once, by one process, and all take the same one. Invalid ones are renamed and reported
    by the main rank.

    Args:
        verify_later: verify the bytes of tensors when they are read, and the others in `confirm` of what is
            returned, which must be called before anything is used; of checkpoints of before 2026-12, now.
        skip: checkpoints not to look at.
    """
    peers = peers or Peers()
    for name in peers.from_main(lambda: [path.name for path in committed(folder) if path not in skip]):
        path = folder / name
        if verify_later:
            opened, problems = _open_watched(path, peers, report, set_aside)
        else:
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


def _open_watched(
    path: Path, peers: Peers, report: Callable[[str], None], set_aside: bool
) -> tuple[OpenCheckpoint | None, list[str]]:
    """Open a checkpoint of which the tensors are verified when they are read, if it has what that takes."""
    try:
        manifest = read_manifest(path)
        if not any("crc32" in one for one in manifest["files"].values()):
            return _open_verified(path, peers.rank, peers.size)
        if problems := verify_outline(path, manifest, rank=peers.rank, size=peers.size):
            return None, problems
        watch = ReadingWatch(path, manifest, peers=peers, report=report, set_aside=set_aside)
        return OpenCheckpoint(path, watch), []
    except CheckpointError as error:
        return None, [str(error)]


def _open_verified(path: Path, rank: int, size: int) -> tuple[OpenCheckpoint | None, list[str]]:
    """Open a checkpoint and verify this process's share of its bytes."""
    if problems := verify(path, rank=rank, size=size):
        return None, problems
    try:
        return open_checkpoint(path), []
    except CheckpointError as error:
        return None, [str(error)]
