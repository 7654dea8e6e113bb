"""The folder of checkpoints: names, the pointer, what is deleted, and checksums in each one's manifest."""

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfmask_dist.common.files import write_text

FORMAT = 2  # 1: whole tensors in one file of torch.distributed.checkpoint
MANIFEST, VALUES, TENSORS = "manifest.json", "values.json", "tensors.json"
_POINTER = "latest"
_NAME = re.compile(r"step-(\d{9})(?:\.(\d+))?")


class CheckpointError(ValueError):
    """A checkpoint is damaged or incomplete; the message says where."""


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the last `last`, every one at a multiple of `every` steps, and the best by
    `metric` (the larger the better) in its values' `metrics`.
    """

    last: int = 2
    every: int = 0
    metric: str | None = None


# ---- names


def fresh_path(folder: Path, step: int) -> Path:
    """Return a name that no directory has: a step is saved again if its earlier save was not committed."""
    path, number = folder / f"step-{step:09d}", 0
    while path.exists():
        number += 1
        path = folder / f"step-{step:09d}.{number}"
    return path


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


def rename_invalid(path: Path, report: Callable[[str], None]) -> None:
    """Rename an invalid checkpoint, so that it is not looked at again, and report it."""
    aside = path.with_name(f"invalid-{path.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    try:
        path.rename(aside)
    except OSError as error:
        report(f"it stays where it is ({error.strerror})")
    else:
        report(f"it is kept as {aside} to look at")


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
        value = json.loads((path / VALUES).read_text())["metrics"][name]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return float(value)


# ---- what is in one


def write_manifest(partial: Path, files: dict[str, dict[str, Any]], *, step: int, block: int) -> None:
    """Write the manifest of a checkpoint.

    Args:
        files: bytes and sha256 of each by name; the latter a list, of each `block` of bytes in turn. Files
            of tensors have a list of crc32 as well.
    """
    manifest = {"format": FORMAT, "step": step, "block": block, "files": files}
    text = json.dumps({**manifest, "sha256": _digest(manifest)}, indent=1)
    write_text(partial / MANIFEST, text, sync=True)


def point_to(path: Path) -> None:
    """Commit a checkpoint's directory: the pointer names it from now on."""
    write_text(path.parent / _POINTER, f"{path.name}\n", sync=True)


def read_manifest(path: Path) -> dict[str, Any]:
    """Return a checkpoint's manifest.

    Raises:
        CheckpointError: it is damaged, or of a format that this version does not read.
    """
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text())
        digest = manifest.pop("sha256")
        if digest != _digest(manifest) or manifest["step"] != step_of(path):
            raise CheckpointError(f"{MANIFEST} is damaged")
        if manifest["format"] not in (1, FORMAT):
            raise CheckpointError(
                f"format {manifest['format']} is not 1 or {FORMAT}, which this version reads"
            )
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{MANIFEST} cannot be read ({type(error).__name__})") from error
    return manifest


def verify(path: Path, *, rank: int = 0, size: int = 1) -> list[str]:
    """Return what is wrong with a checkpoint, file by file; empty where every byte is as it was written.

    Args:
        rank, size: look at the bytes of one of `size` processes alone; together they look at all.
    """
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return [str(error)]
    blocks = _blocks(manifest, manifest["files"])
    return _problems(path, manifest, blocks[rank * len(blocks) // size : (rank + 1) * len(blocks) // size])


def verify_outline(path: Path, manifest: dict[str, Any], *, rank: int = 0, size: int = 1) -> list[str]:
    """Return what is wrong with a checkpoint apart from the bytes of its tensors: with what says where they
    lie and what is no tensor, and with the lengths of files, of which each of `size` processes looks at some.
    """
    problems = _problems(path, manifest, _blocks(manifest, (VALUES, TENSORS)))
    for name in list(manifest["files"])[rank::size]:
        if problem := _wrong_length(path / name, manifest):
            problems.append(f"{name} {problem}")
    return list(dict.fromkeys(problems))


def _blocks(manifest: dict[str, Any], files: Iterable[str]) -> list[tuple[str, int]]:
    """Return (file, number of the block) of all blocks of some files."""
    found = []
    for name in files:
        # format 1 has one checksum of a whole file
        num = 1 if manifest["format"] == 1 else len(manifest["files"][name]["sha256"])
        found += [(name, index) for index in range(max(num, 1))]
    return found


def _problems(path: Path, manifest: dict[str, Any], blocks: Iterable[tuple[str, int]]) -> list[str]:
    problems: dict[str, str] = {}
    for name, index in blocks:
        if name not in problems and (problem := _problem(path / name, manifest, index)):
            problems[name] = f"{name} {problem}"
    return list(problems.values())


def _problem(file: Path, manifest: dict[str, Any], index: int) -> str:
    """Return what is wrong with one block of a file; with the first, its length is looked at too."""
    expected = manifest["files"][file.name]
    block = manifest.get("block")
    if index == 0 and (problem := _wrong_length(file, manifest)):
        return problem
    try:
        size = file.stat().st_size
        found = hash_block(file, index, block or max(size, 1))
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    wanted = expected["sha256"] if block is None else [*expected["sha256"], ""][index]
    return "" if found == wanted or not size else "is not what was written (checksum)"


def _wrong_length(file: Path, manifest: dict[str, Any]) -> str:
    expected = manifest["files"][file.name]["bytes"]
    try:
        size = file.stat().st_size
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return "" if size == expected else f"has {size} bytes and should have {expected}"


def hash_block(file: Path, index: int, block: int) -> str:
    """Return the SHA-256 (hex) of block number `index` of a file."""
    digest, left = hashlib.sha256(), block
    with open(file, "rb", buffering=0) as stream:
        stream.seek(index * block)
        while left and (data := stream.read(min(left, 2**20))):
            digest.update(data)
            left -= len(data)
    return digest.hexdigest()


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
