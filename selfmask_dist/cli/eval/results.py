"""What an evaluation found: one JSON format for all kinds (`docs/evaluation.md`), and a table."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from selfmask_dist.common.files import write_json

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
    """Of one kind. baseline: name of the row that the others are compared with. plot: draws into the path."""

    kind: str
    columns: list[str]
    rows: list[Row]
    settings: dict[str, Any] = field(default_factory=dict)
    baseline: str | None = None
    details: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    plot: Callable[[Path], None] | None = None


class About(Protocol):
    """What the file says of the subject; `Subject` is one."""

    directory: Path

    def about(self) -> dict[str, Any]: ...


def write_results(results: Results, subject: About, seconds: float) -> Path:
    """Write `eval/<kind>.json` and its plot under the subject's folder; returns the JSON's path. By one
    process.
    """
    folder = subject.directory / "eval"
    folder.mkdir(parents=True, exist_ok=True)
    plots = []
    if results.plot is not None:
        results.plot(folder / f"{results.kind}.png")
        plots.append(f"{results.kind}.png")
    fields = asdict(Results(**{**vars(results), "plot": None}))
    del fields["plot"]
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


def read_results(path: Path) -> dict[str, Any]:
    """The object in a result file.

    Raises:
        ValueError: it is not one, or of another version.
    """
    try:
        values: dict[str, Any] = json.loads(path.read_text())
        version = values["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no result of selfmask eval ({error})") from error
    if version != VERSION:
        raise ValueError(f"{path} has format version {version}, this selfmask_dist reads {VERSION}")
    return values


def format_table(results: Results) -> str:
    """Rows by column; beside each number its difference to the baseline's, in points."""
    base = next((row for row in results.rows if row.name == results.baseline), None)
    lines = [[results.kind, *results.columns]]
    for row in results.rows:
        lines.append([row.name, *(_cell(row, column, base) for column in results.columns)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "  ".join(
            [f"{line[0]:{widths[0]}}", *(f"{c:>{w}}" for c, w in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    ]
    return "\n".join([*text, *(f"note: {note}" for note in results.notes)])


def _cell(row: Row, column: str, base: Row | None) -> str:
    value = row.values.get(column)
    if value is None:
        return "-"
    text = f"{value:.4f}" if abs(value) < 10 else f"{value:.1f}"
    if column in row.spread:
        text += f" ±{row.spread[column]:.4f}"
    reference = base.values.get(column) if base is not None else None
    if reference is None or row is base:
        return text + " " * 10 * (base is not None)
    return text + f" ({value - reference:+.4f})".ljust(10)


def join(found: Sequence[Results]) -> Results:
    """The first column of each kind, side by side."""
    names = list(dict.fromkeys(row.name for results in found for row in results.rows))
    rows = [Row(name, {}) for name in names]
    columns = []
    for results in found:
        column = results.columns[0]
        columns.append(column)
        values = {row.name: row.values.get(column) for row in results.rows}
        for row in rows:
            row.values[column] = values.get(row.name)
    return Results("all", columns, rows, baseline=found[0].baseline)


def _plain(value: Any) -> Any:
    """What JSON can hold: NaN and infinity become null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
