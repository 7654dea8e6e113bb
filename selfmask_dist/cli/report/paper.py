"""The paper's numbers for a run, where its backbone, objective and data are the paper's."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Expected:
    """One number of the paper: of a view (frozen, masked, ...), under the name of the measure here."""

    table: str
    view: str
    measure: str
    value: float


@cache
def paper() -> dict[str, Any]:
    """Return the paper's numbers, as `paper.json` has them."""
    found: dict[str, Any] = json.loads((Path(__file__).parent / "paper.json").read_text())
    return found


def expected(config: Mapping[str, Any], views: Mapping[str, Mapping[str, float]]) -> list[Expected]:
    """Return the paper's numbers that stand beside a run's.

    Args:
        config: the run's, as plain values.
        views: {view: {measure: value}}, as the run measured them.
    """
    datasets = {_plain(part) for part in Path(_text(config, "data", "train")).parts}
    backbone = _plain(_text(config, "backbone", "name"))
    numbers = []
    for table in paper()["tables"]:
        if _text(config, "objective", "name") != table["objective"]:
            continue
        if not any(name in backbone for name in table["backbones"]):
            continue
        for row in table["rows"]:
            if row["dataset"] not in datasets or row["view"] not in views:
                continue
            for name in ("knn", "probe", "head"):
                measure = _measure(name, table["knn"], views[row["view"]])
                if name in row and measure is not None:
                    numbers.append(Expected(table["title"], row["view"], measure, row[name]))
    return numbers


def _measure(name: str, k: int | None, values: Mapping[str, float]) -> str | None:
    """Return the measure here that a number of the paper belongs to; where it names no k, the largest."""
    if name != "knn":
        return name if name in values else None
    known = sorted(int(key[3:]) for key in values if re.fullmatch(r"knn\d+", key))
    found = k if k is not None else max(known, default=None)
    return f"knn{found}" if found in known else None


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def _text(config: Mapping[str, Any], section: str, key: str) -> str:
    values = config.get(section)
    return str(values.get(key) or "") if isinstance(values, Mapping) else ""
