"""Numbers and tables for people: as many digits as mean something, a unit, and columns that line up."""

import math
from collections.abc import Sequence
from typing import Any

NONE = "–"  # noqa: RUF001 (an en dash: nothing was measured)


def number(value: Any) -> float | None:
    """Return a finite number as a float; None for whatever else a damaged file may hold."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def accuracy(value: Any) -> str:
    """Return a number from 0 to 1 with three digits, or the sign for nothing."""
    found = number(value)
    return NONE if found is None else f"{found:.3f}"


def percent(value: Any, digits: int = 1) -> str:
    """Return a share in percent; one that so few digits would show as 0 keeps the first that counts."""
    found = number(value)
    if found is None:
        return NONE
    shown = f"{100 * found:.{digits}f}"
    if found and not float(shown):
        shown = f"{100 * found:.1g}"
    return f"{shown} %"


def count(value: Any) -> str:
    """Return a whole number with commas between thousands, or the sign for nothing."""
    found = number(value)
    return NONE if found is None else f"{found:,.0f}"


def size(value: Any) -> str:
    """Return bytes with a unit of 1024, for example `17.3 KiB`."""
    found = number(value)
    if found is None:
        return NONE
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = min(int(math.log2(max(abs(found), 1)) // 10), len(units) - 1)
    return f"{found:,.0f} B" if power == 0 else f"{found / 1024**power:,.1f} {units[power]}"


def duration(seconds: float | None) -> str:
    """Return a time in the two units that matter, for example `3 min 20 s`, or the sign for nothing."""
    if seconds is None or seconds < 0:
        return NONE
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def age(seconds: float) -> str:
    """Return a time in the one unit in which it is two digits or so, as in "5 min" or "3 h"."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def compact(value: Any) -> str:
    """Return a number with four digits that count."""
    found = number(value)
    if found is None:
        return NONE
    if found and not 1e-3 <= abs(found) < 1e5:
        return f"{found:.2e}"
    return f"{found:,.0f}" if abs(found) >= 1000 else f"{found:.4g}"


def table(rows: Sequence[Sequence[str]], *, right: bool | Sequence[bool] = True) -> str:
    """Return rows of text as lines whose columns line up, two blanks apart; the first row is the header.

    Args:
        rows: cells by row; a row may have fewer cells than the first.
        right: whether a column is aligned to the right. True: every column but the first; or one value for
            each column.
    """
    number = max(map(len, rows), default=0)
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(number)]
    sides = [i > 0 and right for i in range(number)] if isinstance(right, bool) else [*right]
    sides += [False] * (number - len(sides))
    return "\n".join(
        "  ".join(f"{cell:{'>' if sides[i] else '<'}{widths[i]}}" for i, cell in enumerate(row)).rstrip()
        for row in rows
    )


def some(names: Sequence[str], limit: int = 5) -> str:
    """Return the first few of many names, for a message."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def positive(text: str) -> int:
    """Return the whole number above 0 that `text` writes.

    Raises:
        ValueError: it writes none. (argparse turns that into a message when this is an argument's type.)
    """
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{text!r} is not a whole number above 0")
    return int(text)
