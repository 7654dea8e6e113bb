"""Checkpoints that cannot go bad: each a fresh directory, with checksums, committed by renaming a pointer.

    checkpoints/step-000000120/  rank-00000.safetensors ...   what each process held, flat and once
                                 tensors.json                 where each tensor's elements lie in these files
                                 values.json manifest.json    what is no tensor; checksums of all files
    checkpoints/latest           the name of the newest committed one

    every rank writes and hashes its file into .partial -> all are whole: the main rank writes the manifest,
    renames the directory, renames the pointer: committed

Killed anywhere in between, the pointer still names a whole checkpoint. A directory is never written twice.
Reading verifies every byte, takes the newest valid one and sets the others aside. A resume verifies the bytes
while it loads them; what it loaded of a checkpoint that turns out damaged is thrown away.

`folder` knows names and checksums, `saving` writes, `opening` verifies, `reading` reads, `watching` verifies
what is read. They know tensors by
name and ranges of their elements, and a JSON dict; nothing of engines or masks.
"""

from selfmask_dist.runs.checkpoint.folder import (
    CheckpointError,
    Retention,
    committed,
    prune,
    step_of,
    verify,
)
from selfmask_dist.runs.checkpoint.opening import load_newest, open_newest, read_checkpoint
from selfmask_dist.runs.checkpoint.peers import Peers, loading_peers, saving_peers
from selfmask_dist.runs.checkpoint.reading import Checkpoint, OpenCheckpoint
from selfmask_dist.runs.checkpoint.saving import Saver, write_checkpoint
from selfmask_dist.runs.checkpoint.watching import DamagedCheckpointError

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "DamagedCheckpointError",
    "OpenCheckpoint",
    "Peers",
    "Retention",
    "Saver",
    "committed",
    "load_newest",
    "loading_peers",
    "open_newest",
    "prune",
    "read_checkpoint",
    "saving_peers",
    "step_of",
    "verify",
    "write_checkpoint",
]
