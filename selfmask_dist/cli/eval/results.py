"""What an evaluation found: one JSON format for all kinds (`docs/evaluation.md`), and a table."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from selfmask_dist.common import names, text
from selfmask_dist.common.files import write_json
from selfmask_dist.common.plots import why_no_pictures

VERSION = 1


class UnavailableError(ValueError):
    """A kind of evaluation that this subject or its data cannot have; the message says why."""


@dataclass
class Row:
    """One view's numbers by column; None where one was not measured. spread: one standard deviation."""

    name: str
    values: dict[str, float | None]
    spread: dict[str, float] = field(default_factory=dict)


@dataclass
class Results:
    """What one kind of evaluation found.

    baseline: name of the row that the others are compared with. headline: the column that stands for the kind
    beside other kinds; the first one where it is empty. plot: draws into the path.
    """

    kind: str
    columns: list[str]
    rows: list[Row]
    settings: dict[str, Any] = field(default_factory=dict)
    baseline: str | None = None
    headline: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    plot: Callable[[Path], None] | None = None


class About(Protocol):
    """What a result's file says of its subject; `EvalSubject` is one."""

    directory: Path

    def about(self) -> dict[str, Any]:
        """Return what the file says: paths, backbone and data."""
        ...


def write_results(results: Results, subject: About, seconds: float) -> Path:
    """Write `eval/<kind>.json` and its plot under the subject's folder; returns the JSON's path. By one
    process.
    """
    folder = subject.directory / names.EVAL
    folder.mkdir(parents=True, exist_ok=True)
    plots = []
    if results.plot is not None:
        if reason := why_no_pictures():
            results.notes.append(f"the picture is left out: {reason}")
        else:
            results.plot(folder / f"{results.kind}.png")
            plots.append(f"{results.kind}.png")
    fields = asdict(replace(results, plot=None))
    del fields["plot"], fields["headline"]
    values = {
        "version": VERSION,
        **subject.about(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
        **fields,
        "plots": plots,
    }
    path = folder / f"{results.kind}.json"
    write_json(path, _plain(values))
    return path


def format_table(results: Results) -> str:
    """Return rows by column as text; beside each number stands its difference to the baseline's."""
    base = next((row for row in results.rows if row.name == results.baseline), None)
    columns = [_column(results.rows, column, base) for column in results.columns]
    rows = [[row.name, *(column[i] for column in columns)] for i, row in enumerate(results.rows)]
    table = text.table([[results.kind, *results.columns], *rows])
    return "\n".join([table, *(f"note: {note}" for note in results.notes)])


def _column(rows: Sequence[Row], name: str, base: Row | None) -> list[str]:
    """Return a column's cells, so that values, spreads and differences each stand under each other."""
    known = [value for row in rows if (value := row.values.get(name)) is not None]
    digits = 4 if all(abs(value) < 10 for value in known) else 1
    reference = None if base is None else base.values.get(name)
    parts = []
    for row in rows:
        value, spread = row.values.get(name), row.spread.get(name)
        difference = ""
        if value is not None and reference is not None and row is not base:
            difference = f" ({value - reference:+.{digits}f})"
        parts.append(
            (
                "-" if value is None else f"{value:.{digits}f}",
                "" if spread is None else f" ±{spread:.{digits}f}",
                difference,
            )
        )
    widths = [max(map(len, part)) for part in zip(*parts, strict=True)]
    return [
        f"{value:>{widths[0]}}{spread:>{widths[1]}}{difference:<{widths[2]}}"
        for value, spread, difference in parts
    ]


def join(found: Sequence[Results]) -> Results:
    """Return the headline column of each kind, side by side."""
    rows = [Row(name, {}) for name in dict.fromkeys(row.name for results in found for row in results.rows)]
    columns = []
    for results in found:
        column = results.headline or results.columns[0]
        columns.append(column)
        values = {row.name: row.values.get(column) for row in results.rows}
        for row in rows:
            row.values[column] = values.get(row.name)
    return Results("all", columns, rows, baseline=found[0].baseline)


def _plain(value: Any) -> Any:
    """Return a value that JSON can hold: NaN and infinity become null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
