"""What a page is made of, as plain data: cells, tables, charts, sections. `page.html` has their markup.

Text is text here and is escaped there; only a chart's SVG is markup already.
"""

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeAlias

from selfmask_dist.cli.report.reading import Run
from selfmask_dist.common.text import NONE

COLOURS = 8  # of curves; beyond, they come again in another style

_MEASURES = {
    "probe": "linear probe",
    "head": "own head",
    "zeroshot": "zero-shot",
    "instance_retrieval": "instance retrieval",
    "monitor/instance_retrieval": "instance retrieval",
}


@dataclass(frozen=True)
class Cell:
    """A cell of a table, or a name in a line.

    css: classes; `n` is a number, aligned to the right. beside: small print beside the text, each with its
    class. heat: percent of the accent colour behind it. colour: the place of a run's colour, shown before the
    text. badge: class of the frame around the text. share: length of a bar before the text, 0 to 1.
    """

    text: str = ""
    css: str = ""
    is_bold: bool = False
    beside: tuple[tuple[str, str], ...] = ()
    heat: float | None = None
    tip: str = ""
    colour: int | None = None
    badge: str = ""
    share: float | None = None


Text: TypeAlias = str | Cell


@dataclass(frozen=True)
class CellTable:
    """Rows of cells; the first cell of each is its header. Made by `table`."""

    kind: ClassVar[str] = "table"
    head: list[Cell]
    rows: list[list[Cell]]
    caption: tuple[Cell, ...] = ()
    css: str = ""


@dataclass(frozen=True)
class Paragraph:
    """A sentence or two in small print."""

    kind: ClassVar[str] = "paragraph"
    text: str


@dataclass(frozen=True)
class Legend:
    """Names beside their colours."""

    kind: ClassVar[str] = "legend"
    names: list[Cell]


@dataclass(frozen=True)
class Chart:
    """A drawing. title: above it. last: the newest value, beside the title. svg: markup."""

    kind: ClassVar[str] = "chart"
    svg: str
    title: str = ""
    last: str = ""


@dataclass(frozen=True)
class Picture:
    """A PNG inside the page. data: in base64. about: what a reader who sees no pictures is told."""

    kind: ClassVar[str] = "picture"
    data: str
    about: str


@dataclass(frozen=True)
class SideBySide:
    """Parts beside each other, as far as there is room. css: the way they stand."""

    kind: ClassVar[str] = "side by side"
    css: str
    parts: Sequence["Part"]


@dataclass(frozen=True)
class Fold:
    """A part that opens when its title is clicked; a plain text is shown as a file would be."""

    kind: ClassVar[str] = "fold"
    title: str
    part: "Part | str"


Part: TypeAlias = CellTable | Paragraph | Legend | Chart | Picture | SideBySide | Fold


@dataclass(frozen=True)
class PageSection:
    """Parts under a heading."""

    title: str
    anchor: str
    note: str
    parts: list[Part]


def section(title: str, *parts: Part | None, note: str = "") -> PageSection | None:
    """Return a section of the parts that are there; None where none is."""
    known = [part for part in parts if part is not None]
    anchor = re.sub(r"\W+", "-", title.lower())
    return PageSection(title, anchor, note, known) if known else None


def table(
    head: Iterable[Text],
    rows: Iterable[Iterable[Text]],
    *,
    caption: Text | Sequence[Text] = (),
    css: str = "",
) -> CellTable:
    """Return a table. The head of a column is aligned as the column's first cell is."""
    lines = [[_cell(cell) for cell in row] for row in rows]
    first = lines[0] if lines else []
    heads = [_cell(cell) for cell in head]
    for i, below in enumerate(first):
        if below.css.startswith("n"):
            heads[i] = replace(heads[i], css="n")
    captions = [caption] if isinstance(caption, str | Cell) else caption
    return CellTable(heads, lines, tuple(_cell(part) for part in captions if part), css)


def _cell(text: Text) -> Cell:
    return Cell(text) if isinstance(text, str) else text


def named(run: Run, view: str | None = None) -> Cell:
    """Return a run's label beside its colour."""
    return Cell(run.label if view is None else f"{run.label}: {view}", colour=run.colour)


def legend(runs: Sequence[Run]) -> Legend | None:
    """Return the names of runs beside their colours; None for one run alone."""
    return Legend([named(run) for run in runs]) if len(runs) > 1 else None


def state_badge(run: Run) -> Cell:
    """Return the state of a run in a frame, with the stage that it is in."""
    state = "failed" if run.error else run.state
    stage = run.heartbeat.get("stage")
    text = f"{state}, {stage}" if stage and state not in ("finished", "failed") else state
    return Cell(text, badge=re.sub("[^a-z]", "-", state))


def measure_name(name: str) -> str:
    """Return how people call a measure: `k-NN (20)` for `knn20`."""
    found = re.fullmatch(r"(?:monitor/)?knn(\d+)(.*)", name)
    return f"k-NN ({found[1]}){found[2]}" if found else _MEASURES.get(name, name)


def in_order(measures: Iterable[str]) -> list[str]:
    """Return measures with k-NN first, by k, then its variants, then the others as they came."""

    def place(name: str) -> tuple[int, int]:
        found = re.fullmatch(r"knn(\d+)(.*)", name)
        return (2, 0) if found is None else (1, 0) if found[2] else (0, int(found[1]))

    return sorted(measures, key=place)


def numeric(text: str) -> Cell:
    """Return a number's cell; a single dash becomes the sign for nothing."""
    return Cell(NONE if text == "-" else text, "n")


def bar(share: float, text: str) -> Cell:
    """Return a cell with a bar of that share, 0 to 1, before the text."""
    return Cell(text, "n", share=max(0.0, min(share, 1.0)))


def picture(run: Run, name: str) -> Picture | None:
    """Return a PNG of a run's folder; None where there is none, or the name leads out of the folder."""
    path = run.path / name
    try:
        data = path.read_bytes()
    except OSError:
        return None
    if not path.resolve().is_relative_to(run.path.resolve()) or not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return None
    return Picture(base64.b64encode(data).decode(), f"{name} of {run.label}")


def mapping(value: Any) -> Mapping[str, Any]:
    """Return `value` if it is a mapping, else an empty one: a damaged file may hold anything."""
    return value if isinstance(value, Mapping) else {}
