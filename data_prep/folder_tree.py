"""What lies in a folder, with links followed once: files that can be read, and everything else by its reason.

Knows no classes or splits. Opening a pipe waits for ever and a link may lead anywhere, so each entry is
looked at before anything is opened.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

from selfmask_dist.common.pictures import EXTENSIONS, is_system_file, kind_of
from selfmask_dist.common.text import some

_HEAD = 1 << 16  # bytes that tell whether a file without a telling name is a picture


@dataclass
class Found:
    """What a folder holds. broken: path and why it cannot be read. system: hidden files and folders, and what
    systems leave behind. loops: links to a folder that was met before.
    """

    folders: list[Path] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    broken: list[tuple[Path, str]] = field(default_factory=list)
    system: list[Path] = field(default_factory=list)
    loops: list[Path] = field(default_factory=list)

    def notes(self, root: Path) -> list[str]:
        """Return a line for each kind of thing that was left out and is no error."""
        told = []
        for paths, what in (
            (self.system, "hidden files or folders, or those of a system, are left out"),
            (self.loops, "links lead back to a folder that was met before, and are not followed again"),
        ):
            if paths:
                told.append(f"{len(paths)} {what} ({some([str(path.relative_to(root)) for path in paths])})")
        return told


def look_into(folder: Path) -> Found:
    """Return what a folder holds itself, by name. Raises ValueError where it cannot be listed."""
    found = Found()
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise ValueError(f"{folder}: cannot be listed ({error.strerror}); mend it or name another") from error
    for name in names:
        path = folder / name
        if is_system_file(name):
            found.system.append(path)
            continue
        try:
            mode = os.stat(path).st_mode
        except OSError as error:
            found.broken.append((path, _why_broken(path, error)))
            continue
        if stat.S_ISDIR(mode):
            found.folders.append(path)
        elif not stat.S_ISREG(mode):
            found.broken.append((path, "is a pipe, a socket or a device, and no file"))
        elif not os.access(path, os.R_OK):
            found.broken.append((path, "may not be read by this user"))
        else:
            found.files.append(path)
    return found


def look_below(folder: Path, *above: Path) -> Found:
    """Return everything below a folder, by path; each folder is entered once, however many links lead to it.

    above: folders that a link must not lead back to, beside those that `folder` lies in.
    """
    whole = Found()
    met = {_identity(path) for path in (folder, *folder.resolve().parents, *above)}
    waiting = [folder]
    while waiting:
        inside = waiting.pop()
        try:
            found = look_into(inside)
        except ValueError as error:
            whole.broken.append((inside, f"is a folder that cannot be listed ({error.__cause__})"))
            continue
        whole.files += found.files
        whole.broken += found.broken
        whole.system += found.system
        for path in found.folders:
            if (identity := _identity(path)) in met:
                whole.loops.append(path)
            else:
                met.add(identity)
                waiting.append(path)
    whole.files.sort()
    whole.broken.sort()
    return whole


def is_picture(path: Path) -> bool:
    """Return whether a file is to be taken for a picture: by its name, else by its first bytes."""
    if path.suffix.lower().removeprefix(".") in EXTENSIONS:
        return True
    try:
        with open(path, "rb") as file:
            return kind_of(file.read(_HEAD)) is not None
    except OSError:
        return True  # reading it whole says what is wrong


def tree_text(folder: Path, most: int = 12) -> str:
    """Return the folders of a folder as lines, each with a few of the names in it."""
    found = look_into(folder)
    lines = [f"  {folder}/"]
    for path in found.folders[:most]:
        try:
            inside = look_into(path)
        except ValueError:
            inside = Found()
        names = [f"{one.name}/" for one in inside.folders] or [one.name for one in inside.files]
        lines.append(f"    {path.name}/  ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})")
    if len(found.folders) > most:
        lines.append(f"    and {len(found.folders) - most} more")
    return "\n".join(lines)


def _identity(path: Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _why_broken(path: Path, error: OSError) -> str:
    if os.path.islink(path):
        return f"is a link to {os.readlink(path)}, which cannot be reached ({error.strerror})"
    return f"cannot be read ({error.strerror})"
