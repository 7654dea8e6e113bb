"""Writing checkpoints: every process its own file, then one of them commits.

    main rank   a fresh directory under a hidden name; is there room on the disk?
    every rank  its file, hashed on the way
    main rank   do the files hold every element once? -> manifest -> rename the directory -> the pointer

A process that fails says so instead, and nothing is committed: the checkpoint before stays the newest.
"""

import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from selfmask_dist.common.files import sync_path, write_text
from selfmask_dist.parallel.parts import TensorPart, whole_parts
from selfmask_dist.runs.checkpoint.folder import (
    TENSORS,
    VALUES,
    Retention,
    fresh_path,
    hash_block,
    point_to,
    prune,
    write_manifest,
)
from selfmask_dist.runs.checkpoint.peers import LostPeersError, Peers
from selfmask_dist.runs.checkpoint.rank_file import BLOCK, Staged, Staging, WrittenFile, write_file
from selfmask_dist.runs.checkpoint.reading import Checkpoint

_FULL = (errno.ENOSPC, errno.EDQUOT)
_SPARE_BYTES = 64 * 1024  # for what is not tensors, and for the run's other files


def write_checkpoint(folder: Path, checkpoint: Checkpoint, *, step: int) -> Path:
    """Write and commit a checkpoint by this process alone; return the new directory.

    Raises:
        OSError: the disk is full, or not writable; nothing is committed. One that is seen to be too full is
            not written to.
    """
    staged = Staging().fill(whole_parts(checkpoint.tensors))
    return save_together(folder, staged, checkpoint.values, step=step, peers=Peers())


def save_together(
    folder: Path, staged: Staged | Exception, values: dict[str, Any], *, step: int, peers: Peers
) -> Path:
    """Write and commit a checkpoint of all processes; return the new directory. Collective.

    Args:
        staged: what this process is to write; or why it cannot, which makes all fail.
        values: of the main rank.

    Raises:
        OSError: as `write_checkpoint`, with the rank that failed; of an error elsewhere, its text.
    """
    partial: Path | None = None
    needed = staged.whole_bytes if isinstance(staged, Staged) else 0
    try:
        path: Path = peers.from_main(lambda: _begin(folder, step, needed))
        partial = _partial(path)
        written = _write(partial / f"rank-{peers.rank:05d}.safetensors", staged)
        all_written = peers.gather(written)
        peers.from_main(lambda: _commit(path, _checked(all_written), staged, values, step))
    except BaseException as error:
        if peers.is_main and partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        if peers.is_main and isinstance(error, OSError) and error.errno in _FULL:
            raise _disk_full(folder, needed, error) from error
        raise
    return path


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _begin(folder: Path, step: int, needed: int) -> Path:
    """Make the directory to write into, and return its final name."""
    folder.mkdir(parents=True, exist_ok=True)
    path = fresh_path(folder, step)
    partial = _partial(path)
    shutil.rmtree(partial, ignore_errors=True)
    if shutil.disk_usage(folder).free < needed + _SPARE_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    partial.mkdir()
    return path


def _write(path: Path, staged: Staged | Exception) -> WrittenFile | Exception:
    """Write this process's file; return why it could not be written, for the main rank to hear."""
    if isinstance(staged, Exception):
        return staged
    try:
        return write_file(path, staged)
    except FileNotFoundError as error:
        text = f"{path.parent} is not there; all nodes need the run's folder on one shared file system"
        return OSError(error.errno, text)
    except Exception as error:
        return error


def _checked(written: Sequence[WrittenFile | Exception]) -> list[WrittenFile]:
    """Return the files of all ranks. Raises the first rank's error where not all were written."""
    for rank, one in enumerate(written):
        if isinstance(one, Exception):
            where = f"rank {rank}: " if len(written) > 1 else ""
            if isinstance(one, OSError) and one.errno is not None:
                raise OSError(one.errno, f"{where}{one.strerror}")
            raise OSError(errno.EIO, f"{where}{type(one).__name__}: {one}")
    return [one for one in written if isinstance(one, WrittenFile)]


def _commit(
    path: Path, written: list[WrittenFile], staged: Staged | Exception, values: dict[str, Any], step: int
) -> None:
    assert isinstance(staged, Staged)
    partial = _partial(path)
    write_text(partial / TENSORS, json.dumps(_places(written, staged)), sync=True)
    write_text(partial / VALUES, json.dumps(values, allow_nan=False, indent=1), sync=True)
    files: dict[str, dict[str, Any]] = {
        one.name: {"bytes": one.num_bytes, "sha256": one.sha256, "crc32": one.crc32} for one in written
    }
    for name in (TENSORS, VALUES):
        size = (partial / name).stat().st_size
        hashes = [hash_block(partial / name, index, BLOCK) for index in range(-(-size // BLOCK))]
        files[name] = {"bytes": size, "sha256": hashes}
    write_manifest(partial, files, step=step, block=BLOCK)
    sync_path(partial)
    partial.rename(path)
    sync_path(path.parent)
    point_to(path)


def _places(written: list[WrittenFile], staged: Staged) -> dict[str, Any]:
    """Return where each tensor's elements lie: [first element, elements, number of the file, byte] in order.

    Raises:
        OSError: an element was written by no process, or by two.
    """
    tensors: dict[str, Any] = {
        name: {"dtype": str(dtype).removeprefix("torch."), "shape": list(shape), "pieces": []}
        for name, (dtype, shape) in staged.tensors.items()
    }
    for number, file in enumerate(written):
        for piece in file.pieces:
            tensors[piece.name]["pieces"].append([piece.start, piece.length, number, piece.offset])
    for name, (_, shape) in staged.tensors.items():
        tensors[name]["pieces"].sort()
        reached = 0
        for start, length, number, _ in tensors[name]["pieces"]:
            if start != reached:
                raise OSError(
                    errno.EIO, f"{name}: elements from {reached} on, not {start}, were due from {number}"
                )
            reached = start + length
        if reached != shape.numel():
            raise OSError(errno.EIO, f"{name}: {reached} of {shape.numel()} elements were written")
    return {"files": [one.name for one in written], "tensors": tensors}


def _disk_full(folder: Path, needed: int, error: OSError) -> OSError:
    free = shutil.disk_usage(folder).free
    return OSError(
        error.errno,
        f"{error.strerror}: it takes {needed / 1e6:.1f} MB and {folder} has {free / 1e6:.1f} MB free (a "
        f"quota may leave less); make room, or keep fewer checkpoints (checkpoint.keep_last)",
    )


class Saver:
    """Writes checkpoints in a thread, one at a time. Every process of a run has one.

    Args:
        peers: the processes that save together.
        on_commit: called in the thread of the main rank with each new directory and the seconds it took.
        on_failure: called there with the reason why one could not be saved.

    `is_lost`: another process was gone while one was saved. Nothing is saved any more, as the others may be
    anywhere in their messages; training meets the loss at its next collective.
    """

    def __init__(
        self,
        folder: Path,
        retention: Retention,
        *,
        peers: Peers | None = None,
        on_commit: Callable[[Path, float], None] = lambda path, seconds: None,
        on_failure: Callable[[str], None] = print,
    ) -> None:
        self._folder = folder
        self._retention = retention
        self._peers = peers or Peers()
        self._on_commit = on_commit
        self._on_failure = on_failure
        self._staging = Staging()
        self._thread: threading.Thread | None = None
        self.is_lost = False

    @property
    def is_main(self) -> bool:
        """Whether this process commits, and so says when."""
        return self._peers.is_main

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._thread is not None and self._thread.is_alive()

    def save(self, parts: Sequence[TensorPart], values: dict[str, Any], *, step: int) -> None:
        """Copy this process's parts and start writing; waits for an earlier one first.

        A failure is reported and training goes on. Collective: every rank must call.
        """
        self.finish()
        if self.is_lost:
            if self.is_main:
                self._on_failure(f"the checkpoint of step {step} is not saved: another process is gone")
            return
        staged: Staged | Exception
        try:
            staged = self._staging.fill(parts)
        except Exception as error:  # told where files are gathered, so that nobody waits for this rank's
            staged = error
        self._thread = threading.Thread(target=self._work, args=(staged, values, step), name="checkpoint")
        self._thread.start()

    def finish(self) -> None:
        """Wait until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        """Wait likewise, and give back the memory that states are copied to; another save takes it again."""
        self.finish()
        self._staging = Staging()

    def _work(self, staged: Staged | Exception, values: dict[str, Any], step: int) -> None:
        start = time.perf_counter()
        try:
            path = save_together(self._folder, staged, values, step=step, peers=self._peers)
        except Exception as error:
            self.is_lost = isinstance(error, LostPeersError)
            if self.is_main:
                self._on_failure(f"the checkpoint of step {step} could not be saved: {error}")
            return
        if not self.is_main:
            return
        self._on_commit(path, time.perf_counter() - start)
        try:
            prune(self._folder, self._retention)
        except OSError as error:
            self._on_failure(f"old checkpoints could not be deleted: {error}")
