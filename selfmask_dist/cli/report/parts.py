"""What the sections of a report are made of."""

import base64
import re
from collections.abc import Mapping, Sequence
from typing import Any

from selfmask_dist.cli.report.charts import COLOURS
from selfmask_dist.cli.report.markup import Child, Html, join, tag
from selfmask_dist.cli.report.reading import Run
from selfmask_dist.common.text import NONE

_MEASURES = {"probe": "linear probe", "head": "own head", "zeroshot": "zero-shot"}


def section(title: str, *content: Child, note: Child = None) -> Html | None:
    """A part of the page under a heading; None where it has no content."""
    parts = [part for part in content if part]
    if not parts:
        return None
    anchor = re.sub(r"\W+", "-", title.lower())
    lead = None if note is None else tag("p", note, class_="note")
    return tag("section", tag("h2", title), lead, parts, id=anchor)


def swatch(colour: int) -> Html:
    return tag("i", class_=f"swatch s{colour % COLOURS}" + (" again" if colour >= COLOURS else ""))


def named(run: Run, view: str | None = None) -> Html:
    """A run's label beside its colour."""
    return join(swatch(run.colour), run.label if view is None else f"{run.label}: {view}")


def legend(runs: Sequence[Run]) -> Html | None:
    if len(runs) < 2:
        return None
    return tag("p", [tag("span", named(run)) for run in runs], class_="legend")


def state_badge(run: Run) -> Html:
    state = "failed" if run.error else run.state
    stage = run.heartbeat.get("stage")
    text = f"{state}, {stage}" if stage and state not in ("finished", "failed") else state
    return tag("span", text, class_=f"badge {re.sub('[^a-z]', '-', state)}")


def measure_name(name: str) -> str:
    found = re.fullmatch(r"(?:monitor/)?knn(\d+)(.*)", name)
    return f"k-NN ({found[1]}){found[2]}" if found else _MEASURES.get(name, name)


def fold(title: Child, content: Child) -> Html:
    return tag("details", tag("summary", title), content)


def numeric(text: str) -> Html:
    return tag("td", NONE if text == "-" else text, class_="n")


def bar(share: float, text: str) -> Html:
    width = f"width:{max(0.0, min(share, 1.0)) * 100:.1f}%"
    return tag("td", tag("span", tag("i", style=width), class_="bar"), text, class_="n")


def picture(run: Run, name: str) -> Html | None:
    path = run.path / name
    try:
        data = path.read_bytes()
    except OSError:
        return None
    if not path.resolve().is_relative_to(run.path.resolve()) or not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return None
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return tag("figure", tag("img", src=source, alt=f"{name} of {run.label}"), class_="picture")


def mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
