"""Files that are whole or not there: written under a temporary name, and renamed at the end.

with replacing(path) as partial:      # any writer that takes a path
    save_file(tensors, partial)
write_text(path, "...")
write_json(path, {"loss": 0.5})
"""

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path, *, sync: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to, and rename it to `path` when the block ends.

    If the block raises, the temporary file is removed and `path` stays as it was. The temporary name is
    hidden, ends in `.partial` and holds the process's id, so two writers never share it. Others may read the
    file as the umask says, whatever the writer sets (safetensors makes files that only the owner can read).

    Args:
        path: the file to write; its folder must exist.
        sync: also force the data to the disk before renaming, and the rename after it: then the file outlives
            a crash of the machine. It costs some milliseconds.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.touch()
        mode = (
            partial.stat().st_mode
        )  # as the umask has it; a process's umask cannot be read without setting it
        yield partial
        partial.chmod(stat.S_IMODE(mode))
        if sync:
            sync_path(partial)
        partial.replace(path)
        if sync:
            sync_path(path.parent)
    except OSError as error:
        if error.filename == str(partial):  # the name that the user knows
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        with suppress(OSError):  # of a file system that takes nothing; the reason was raised above
            partial.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes, *, sync: bool = False) -> None:
    """Write `data` to `path` so that a reader never sees half of it; see `replacing`."""
    with replacing(path, sync=sync) as partial:
        partial.write_bytes(data)


def write_text(path: Path, text: str, *, sync: bool = False) -> None:
    """Write `text` as UTF-8 to `path` so that a reader never sees half of it; see `replacing`."""
    write_bytes(path, text.encode(), sync=sync)


def write_json(path: Path, value: Any, *, sync: bool = False) -> None:
    """Write indented JSON to `path` so that a reader never sees half of it; see `replacing`.

    Raises:
        ValueError: `value` holds a number that is not finite, which JSON cannot express.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n", sync=sync)


def sync_path(path: Path) -> None:
    """Force what was written to a file, or the renames inside a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal, without holding the file in memory."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
