"""From outcomes to numbers over seeds, and to `docs/methods_table.md`.

Knows nothing of how rows are measured.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.methods.row import Row

YARDSTICK = "finetune_sgd"
COLUMNS = ("knn20", "probe", "head", "active", "stored_bytes", "step_ratio")
_HEADER = (
    "| method | group | k-NN | probe | own head | active | bytes stored | step / fine-tuning | rates |",
    "|---|---|---:|---:|---:|---:|---:|---:|---|",
)


def summarise(
    found: Mapping[str, list[Any]], rounds: Mapping[str, Sequence[float]]
) -> dict[str, dict[str, Any]]:
    """Mean and spread over seeds of every column, for each row.

    Args:
        rounds: {row: ratios of its step to the yardstick's}; runs themselves share a machine with others.
    """
    summary: dict[str, dict[str, Any]] = {}
    for name, outcomes in found.items():
        errors = [one for one in outcomes if isinstance(one, str)]
        columns: dict[str, Any] = {"errors": errors} if errors else {}
        for key in COLUMNS[:-1]:
            columns[key] = _spread(_get(one, key) for one in outcomes)
        columns["step_ratio"] = _spread(rounds.get(name, ()))
        columns["more"] = [one["more"] for one in outcomes if isinstance(one, dict) and one["more"]]
        summary[name] = columns
    return summary


def _get(outcome: Any, key: str) -> Any:
    return outcome.get(key) if isinstance(outcome, dict) else None


def _spread(values: Iterable[Any]) -> dict[str, float] | None:
    numbers = [value for value in values if value is not None]
    if not numbers:
        return None
    return {
        "mean": statistics.fmean(numbers),
        "median": statistics.median(numbers),
        "sd": statistics.pstdev(numbers),
        "seeds": len(numbers),
    }


def write_table(
    path: Path,
    rows: Sequence[Row],
    sections: Mapping[str, Mapping[str, dict[str, Any]]],
    heads: Mapping[str, str],
) -> None:
    """A table for each data set, as it came out.

    Args:
        heads: what stands above each section, and as `about` above all.
    """
    lines = ["# Every method on one budget", "", heads["about"], ""]
    groups = {row.name: row.group for row in rows}
    for title, summary in sections.items():
        lines += [f"## {title}", "", heads[title], "", *_HEADER]
        for name, columns in summary.items():
            cells = [_cell(columns[key], key) for key in COLUMNS]
            failed = f" (failed {len(columns['errors'])} times)" if "errors" in columns else ""
            rates = _rates(columns.get("rates", ()))
            lines.append(f"| {name}{failed} | {groups[name]} | {' | '.join(cells)} | {rates} |")
        lines.append("")
        notes = [f"- {name}: {text}" for name, c in summary.items() if (text := _note(c["more"]))]
        if notes:
            lines += ["Further numbers of single rows, first seed:", "", *notes, ""]
    path.write_text("\n".join(lines))


def _rates(overrides: Sequence[str]) -> str:
    """`optim.score_lr=100` as `score 100`."""
    parts = [entry.removeprefix("optim.").replace("_lr=", " ") for entry in overrides]
    return ", ".join(parts) or "-"


def _cell(spread: dict[str, float] | None, key: str) -> str:
    if spread is None:
        return "-"
    if key == "stored_bytes":
        return f"{spread['mean']:,.0f}"
    if key == "step_ratio":
        return f"{spread['median']:.2f}"
    if spread["seeds"] == 1:
        return f"{spread['mean']:.3f}"
    return f"{spread['mean']:.3f} ± {spread['sd']:.3f}"


def _note(more: Sequence[dict[str, Any]]) -> str:
    """Numbers and remarks in a line; what has a form of its own stands in the result file."""
    if not more:
        return ""
    return "; ".join(text for key, value in more[0].items() if (text := _short(key, value)))


def _short(key: str, value: Any) -> str:
    if isinstance(value, dict):
        inner = ", ".join(_short(str(name), part) for name, part in value.items())
        return f"{key}: {inner}"
    if isinstance(value, list):
        return f"{key}: {', '.join(f'{part:.3g}' for part in value)}" if _are_numbers(value) else ""
    if isinstance(value, float):
        return f"{key} {value:.3g}"
    return f"{key} {value}" if "\n" not in str(value) else ""


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float) for value in values)
