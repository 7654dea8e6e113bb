"""Checkpoints that cannot go bad: each a fresh directory, with checksums, committed by renaming a pointer.

    checkpoints/step-000000120/  *.distcp .metadata (torch.distributed.checkpoint) values.json manifest.json
    checkpoints/latest           the name of the newest committed one

    write into .partial -> checksums -> rename the directory -> rename the pointer: committed

Killed anywhere in between, the pointer still names a whole checkpoint. A directory is never written twice.
Reading verifies every byte, takes the newest valid one and sets the others aside. Knows tensors by name and a
JSON dict; nothing of engines, masks or process groups: one process writes.
"""

import errno
import hashlib
import json
import re
import shutil
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from selfmask_dist.common.files import sha256, sync_path, write_text

_FORMAT = 1
_NAME = re.compile(r"step-(\d{9})(?:\.(\d+))?")
_POINTER, _MANIFEST, _VALUES = "latest", "manifest.json", "values.json"
_SPARE_BYTES = 64 * 1024  # for what is not tensors, and for the run's other files


class CheckpointError(ValueError):
    """A checkpoint is damaged or incomplete; the message says where."""


@dataclass(frozen=True)
class Checkpoint:
    """What one holds: tensors by name, whole and on the CPU, and a dict that JSON can hold."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the last `last`, every one at a multiple of `every` steps, and the best by
    `metric` (the larger the better) in its values' `metrics`.
    """

    last: int = 2
    every: int = 0
    metric: str | None = None


# ---- writing


def write_checkpoint(folder: Path, checkpoint: Checkpoint, *, step: int) -> Path:
    """Write and commit a checkpoint; return the new directory.

    Raises:
        OSError: the disk is full, or not writable; nothing is committed. One that is seen to be too full is
            not written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = _fresh_path(folder, step)
    partial = folder / f".{path.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    needed = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    if shutil.disk_usage(folder).free < needed + _SPARE_BYTES:
        raise _disk_full(folder, needed)
    try:
        _write_files(partial, checkpoint, step)
        partial.rename(path)
        sync_path(folder)
        write_text(folder / _POINTER, f"{path.name}\n", sync=True)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(folder, needed) from error
        raise
    return path


def _disk_full(folder: Path, needed: int) -> OSError:
    free = shutil.disk_usage(folder).free
    return OSError(
        errno.ENOSPC,
        f"No space left on device: it takes {needed / 1e6:.1f} MB and {folder} has {free / 1e6:.1f} MB free "
        f"(a quota may leave less); make room, or keep fewer checkpoints (checkpoint.keep_last)",
    )


def _write_files(partial: Path, checkpoint: Checkpoint, step: int) -> None:
    writer = dcp.FileSystemWriter(partial, single_file_per_rank=True, sync_files=True, thread_count=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of having no process group, which is the intent
            dcp.save(dict(checkpoint.tensors), storage_writer=writer, no_dist=True)
    except dcp.CheckpointException as error:  # it wraps what the disk said
        cause: BaseException | None = next((failure[0] for failure in error.failures.values()), error)
        text = str(cause)
        while cause is not None and not isinstance(cause, OSError):  # torch's own error, then what it is of
            cause = cause.__cause__ or cause.__context__
        if cause is not None:
            raise OSError(cause.errno, f"writing {partial} failed: {cause.strerror}") from error
        raise OSError(errno.EIO, f"writing {partial} failed: {text}") from error
    write_text(partial / _VALUES, json.dumps(checkpoint.values, allow_nan=False, indent=1), sync=True)
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(partial.iterdir())
    }
    manifest = {"format": _FORMAT, "step": step, "files": files}
    text = json.dumps({**manifest, "sha256": _digest(manifest)}, indent=1)
    write_text(partial / _MANIFEST, text, sync=True)


def _fresh_path(folder: Path, step: int) -> Path:
    """Return a name that no directory has: a step is saved again if its earlier save was not committed."""
    path, number = folder / f"step-{step:09d}", 0
    while path.exists():
        number += 1
        path = folder / f"step-{step:09d}.{number}"
    return path


def prune(folder: Path, retention: Retention) -> list[Path]:
    """Delete what `retention` does not keep, and what killed saves left; return what was deleted."""
    paths = committed(folder)
    kept = set(paths[: max(retention.last, 1)])
    if retention.every:
        kept |= {path for path in paths if step_of(path) % retention.every == 0}
    if retention.metric is not None:
        measured = {path: _metric(path, retention.metric) for path in paths}
        best = max((value for value in measured.values() if value is not None), default=None)
        if best is not None:
            kept.add(next(path for path in paths if measured[path] == best))
    leftover = [path for path in _all(folder) if path not in paths]
    deleted = [path for path in paths if path not in kept] + leftover + list(folder.glob(".step-*.partial"))
    for path in deleted:
        doomed = path.with_name(f".{path.name.removeprefix('.')}.partial")
        if path != doomed:
            path.rename(doomed)  # at once, so that nobody finds half of it
        shutil.rmtree(doomed, ignore_errors=True)
    return deleted


def _metric(path: Path, name: str) -> float | None:
    try:
        value = json.loads((path / _VALUES).read_text())["metrics"][name]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return float(value)


# ---- reading


def committed(folder: Path) -> list[Path]:
    """Return the committed checkpoints, newest first. Looks at names only."""
    paths = _all(folder)
    try:
        newest = folder / (folder / _POINTER).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return paths
    if newest not in paths:
        return paths  # a damaged pointer, or what it names was set aside
    return paths[paths.index(newest) :]


def load_newest(
    folder: Path, *, report: Callable[[str], None] = print, set_aside: bool = True
) -> tuple[Checkpoint, Path] | None:
    """Return the newest valid checkpoint, None where there is none. Invalid ones are renamed and reported."""
    for path in committed(folder):
        try:
            return read_checkpoint(path), path
        except CheckpointError as error:
            report(f"checkpoint {path.name} is not used: {error}")
            if set_aside:
                _set_aside(path, report)
    return None


def read_checkpoint(path: Path) -> Checkpoint:
    """Verify a checkpoint and return it. Raises CheckpointError naming the file that is damaged."""
    if problems := verify(path):
        raise CheckpointError("; ".join(problems))
    try:
        values = json.loads((path / _VALUES).read_text())
        reader = dcp.FileSystemReader(path)
        tensors = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in reader.read_metadata().state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(tensors, storage_reader=reader, no_dist=True)
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return Checkpoint(tensors, values)


def verify(path: Path) -> list[str]:
    """Return what is wrong with a checkpoint, file by file; empty where every byte is as it was written."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        digest = manifest.pop("sha256")
        if digest != _digest(manifest) or manifest["step"] != step_of(path):
            return [f"{_MANIFEST} is damaged"]
        if manifest["format"] != _FORMAT:
            return [f"format {manifest['format']} is not {_FORMAT}, which this version reads"]
        files = manifest["files"]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return [f"{_MANIFEST} cannot be read ({type(error).__name__})"]
    problems = []
    for name, expected in files.items():
        file = path / name
        try:
            if file.stat().st_size != expected["bytes"]:
                problems.append(f"{name} has {file.stat().st_size} bytes and should have {expected['bytes']}")
            elif sha256(file) != expected["sha256"]:
                problems.append(f"{name} is not what was written (checksum)")
        except OSError as error:
            problems.append(f"{name} cannot be read ({error.strerror})")
    return problems


def step_of(path: Path) -> int:
    """Return the step in the name of a checkpoint's directory. Raises CheckpointError for another name."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path} is not the name of a checkpoint")
    return int(match.group(1))


def _all(folder: Path) -> list[Path]:
    """Return the directories under a final name, newest first."""
    found = [(match, path) for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    found.sort(key=lambda pair: (int(pair[0].group(1)), int(pair[0].group(2) or 0)), reverse=True)
    return [path for _, path in found if path.is_dir()]


def _set_aside(path: Path, report: Callable[[str], None]) -> None:
    aside = path.with_name(f"invalid-{path.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    try:
        path.rename(aside)
    except OSError as error:
        report(f"it stays where it is ({error.strerror})")
    else:
        report(f"it is kept as {aside} to look at")


# ---- in the background


class Saver:
    """Writes checkpoints in a thread, one at a time. Only the main rank has one.

    Args:
        on_commit: called in the thread with each new directory and the seconds it took.
    """

    def __init__(
        self,
        folder: Path,
        retention: Retention,
        *,
        on_commit: Callable[[Path, float], None] = lambda path, seconds: None,
        on_failure: Callable[[str], None] = print,
    ) -> None:
        self._folder = folder
        self._retention = retention
        self._on_commit = on_commit
        self._on_failure = on_failure
        self._thread: threading.Thread | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._thread is not None and self._thread.is_alive()

    def save(self, checkpoint: Checkpoint, *, step: int) -> None:
        """Start writing; waits for an earlier one first. A failure is reported and training goes on."""
        self.finish()
        self._thread = threading.Thread(target=self._work, args=(checkpoint, step), name="checkpoint")
        self._thread.start()

    def finish(self) -> None:
        """Wait until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _work(self, checkpoint: Checkpoint, step: int) -> None:
        start = time.perf_counter()
        try:
            path = write_checkpoint(self._folder, checkpoint, step=step)
        except Exception as error:
            self._on_failure(f"the checkpoint of step {step} could not be saved: {error}")
            return
        self._on_commit(path, time.perf_counter() - start)
        try:
            prune(self._folder, self._retention)
        except OSError as error:
            self._on_failure(f"old checkpoints could not be deleted: {error}")


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
