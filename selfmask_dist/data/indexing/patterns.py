"""What a written path stands for: braces, glob patterns and several paths in one.

Knows names, and of files only whether they are there. As in a shell,

    a-{000..002}.tar  ->  a-000.tar a-001.tar a-002.tar        {train,val}/*.tar  ->  train/*.tar val/*.tar

and `::` stands between several paths, as other readers of WebDataset tars write it.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

_BETWEEN = "::"
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?")
_INNERMOST = re.compile(r"\{([^{}]*)\}")


def written(path: str | Path | Sequence[str | Path]) -> str:
    """Return one text for a path or for several, which `expand` takes apart again."""
    if isinstance(path, str | os.PathLike):
        if not os.fspath(path):
            raise ValueError("the path is empty; name a folder of tars, a tar or a pattern")
        return os.fspath(path)
    if not isinstance(path, Iterable):
        raise TypeError(f"{path!r} ({type(path).__name__}) is no path, and no list of paths")
    if not path:
        raise ValueError("the list of paths is empty; name at least one folder, tar or pattern")
    return _BETWEEN.join(os.fspath(part) for part in path)


def is_pattern(path: str) -> bool:
    """Return whether a path that names no file stands for others."""
    return any(sign in path for sign in "*?[{") or _BETWEEN in path


def expand(path: str) -> list[str]:
    """Return every path that a text stands for after braces and `::`, in order; glob signs stay in them.

    A part that is there under just that name is taken as it is. Raises ValueError for a range that is empty.
    """
    found: list[str] = []
    for part in [path] if os.path.exists(path) else path.split(_BETWEEN):
        part = os.path.expanduser(part.strip())
        found += [part] if os.path.exists(part) else _braces(part)
    return found


def matches(path: str) -> list[str]:
    """Return what a path without braces names: itself where it is there, else what its glob signs match."""
    return [path] if os.path.lexists(path) else sorted(glob.glob(path))


def _braces(text: str) -> list[str]:
    """Expand the first pair of braces that holds a range or a comma, and then the rest."""
    for match in _INNERMOST.finditer(text):
        choices = _range(match.group(1), text) or (match.group(1).split(",") if "," in match.group(1) else [])
        if choices:
            before, after = text[: match.start()], text[match.end() :]
            return list(dict.fromkeys(one for choice in choices for one in _braces(before + choice + after)))
    return [text]


def _range(inside: str, text: str) -> list[str]:
    match = _RANGE.fullmatch(inside)
    if match is None:
        return []
    first, last = match.group(1), match.group(2)
    step = abs(int(match.group(3) or 1))
    if step == 0:
        raise ValueError(f"{text}: the step of {{{inside}}} is 0; it must be at least 1")
    start, end = int(first), int(last)
    is_padded = any(len(number.lstrip("-")) > 1 and number.lstrip("-")[0] == "0" for number in (first, last))
    width = max(len(first), len(last)) if is_padded else 0
    numbers = range(start, end + 1, step) if start <= end else range(start, end - 1, -step)
    return [f"{number:0{width}d}" for number in numbers]
