"""Write the tables of docs/unlabelled.md anew from `benchmarks/results/labelfree.json`.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; the names are those of `TABLES`.

    python -m benchmarks.evidence.labelfree_tables
"""

import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.evidence.labelfree import FEW_LABELS
from benchmarks.harness import RESULTS

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "unlabelled.md"
MODELS = {"vit": "ViT-tiny", "resnet": "ResNet-18 trunk", "mobilenet": "MobileNetV2"}
SETS = {"grocery": "grocery", "clothing": "clothing", "rbc": "red blood cells", "deepweeds": "weeds"}
OTHERS = {
    "nbd, LoRA r=4": "LoRA r=4",
    "nbd, biases": "biases",
    "swav": "SwAV mask",
    "simclr": "SimCLR mask",
}
DECISIONS = {"adapted": "use", "neutral": "neutral", "frozen": "keep frozen"}
_BLOCK = re.compile(r"(<!-- table: ([a-z0-9 ]+) -->\n).*?(<!-- end -->)", re.DOTALL)
Row = dict[str, Any]


class Rows:
    """The rows of a result file, by cell."""

    def __init__(self, rows: dict[str, Row]) -> None:
        self._rows = rows

    @classmethod
    def read(cls, path: Path = RESULTS / "labelfree.json") -> "Rows":
        """Return those of a result file."""
        return cls(json.loads(path.read_text())["figures"]["rows"])

    def of(self, dataset: str, model: str, pixels: int, method: str) -> list[Row]:
        """Return the rows of every seed of a cell, those at another rate than the default left out."""
        cell = f"{dataset} {model} {pixels} px 1024 pictures | {method}, seed "
        return [row for key, row in self._rows.items() if key.startswith(cell)]


def signed(points: float) -> str:
    """Return a difference in points with its sign, without a zero before the point."""
    text = f"{abs(points):.1f}".removeprefix("0")
    return ("+" if points >= 0 else "-") + text


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def gain(rows: Sequence[Row], measure: str) -> str:
    """Return the mean difference over seeds, +- one seed's paired standard error (the mean of them)."""
    points = 100 * mean([row[measure]["difference"] for row in rows])
    return f"{signed(points)} +- {100 * mean([row[measure]['error'] for row in rows]):.1f}"


def seeds(rows: Sequence[Row]) -> str:
    """Return how many seeds there are and how far they lie apart."""
    points = [100 * row["knn"]["difference"] for row in rows]
    return f"({len(rows)}, spread {max(points) - min(points):.1f})" if len(rows) > 1 else "(1)"


def decided(rows: Sequence[Row]) -> str:
    """Return the rise of instance retrieval in points, and what was decided."""
    rises = [round(100 * row["retrieval"]["difference"]) for row in rows]
    low, high = min(rises), max(rises)
    words = sorted({DECISIONS[row["retrieval"]["decision"]] for row in rows})
    return (f"{low:+d}" if low == high else f"{low:+d} to {high:+d}") + f", {' or '.join(words)}"


def main_table(rows: Rows, pixels: int, others: Sequence[str]) -> list[str]:
    """Return the masks of every cell at a size, with other adapters and objectives where they were run."""
    heads = ["", "frozen k-NN", "masks (seeds)", "whitened k-NN", "linear probe", "R, decision", "mask"]
    lines = [heads + [OTHERS[one] for one in others]]
    for model, title in MODELS.items():
        lines.append([f"**{title}**", *[""] * (len(lines[0]) - 1)])
        for dataset, name in SETS.items():
            if not (found := rows.of(dataset, model, pixels, "nbd")):
                continue
            compared = [rows.of(dataset, model, pixels, one) for one in others]
            lines.append(
                [
                    name,
                    f"{found[0]['knn']['frozen']:.3f}".removeprefix("0"),
                    f"{gain(found, 'knn')} {seeds(found)}",
                    gain(found, "whitened knn"),
                    gain(found, "probe"),
                    decided(found),
                    f"{mean([row['bytes'] for row in found]) / 1024:.1f} KB",
                    *(
                        (gain(other, "knn") + (f" ({len(other)})" if len(other) > 1 else "")) if other else ""
                        for other in compared
                    ),
                ]
            )
    return markdown(lines)


def few_labels(rows: Rows) -> list[str]:
    """Return the probe's accuracy on few labels, frozen, and its gain; errors are over five draws."""
    lines = [["", *(f"{100 * share:g} %" for share in FEW_LABELS)]]
    for model, title in MODELS.items():
        for dataset, name in SETS.items():
            found = rows.of(dataset, model, 64, "nbd")
            if found:
                shares = (_few(found, f"{share:g}") for share in FEW_LABELS)
                lines.append([f"{title}, {name}", *shares])
    return markdown(lines)


def _few(rows: Sequence[Row], share: str) -> str:
    drawn = [row["few labels"][share] for row in rows if share in row.get("few labels", {})]
    if not drawn:
        return "-"
    frozen = [value for one in drawn for value in one["frozen"]]
    gains = [100 * (a - f) for one in drawn for a, f in zip(one["adapted"], one["frozen"], strict=True)]
    draws = len(drawn[0]["frozen"])  # the same pictures with each seed, so no more of them
    error = statistics.stdev(gains) / draws**0.5
    return f"{mean(frozen):.3f}".removeprefix("0") + f" {signed(mean(gains))} +- {error:.1f}"


def markdown(lines: Sequence[Sequence[str]]) -> list[str]:
    """Return a table whose first line is its head."""
    head, *rest = ["| " + " | ".join(line) + " |" for line in lines]
    return [head, "|" + "---|" * len(lines[0]), *rest]


TABLES: dict[str, Callable[[Rows], list[str]]] = {
    "64 pixels": lambda rows: main_table(rows, 64, list(OTHERS)),
    "128 pixels": lambda rows: main_table(rows, 128, []),
    "few labels": few_labels,
}


def rewritten(document: str, rows: Rows) -> str:
    """Return the document with every table as the result file has it."""
    return _BLOCK.sub(lambda block: block[1] + "\n".join(TABLES[block[2]](rows)) + "\n" + block[3], document)


if __name__ == "__main__":
    DOCUMENT.write_text(rewritten(DOCUMENT.read_text(), Rows.read()))
    sys.exit(0)
