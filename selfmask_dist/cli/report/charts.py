"""Curves and dendrograms as SVG, drawn by matplotlib and coloured by the page's style.

matplotlib writes colours into the drawing, and a page has two sets of them, light and dark. So a drawing is
made in stand-ins (`#010101` and the like, used for nothing else), and these become the page's variables.
"""

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from selfmask_dist.cli.report.parts import COLOURS, Chart
from selfmask_dist.common.optional import require

_WIDTH, _HEIGHT = 344, 168  # of a chart, in CSS pixels where the page is at its widest
_MAX_DOTS = 24  # points up to which each has a dot
_INK, _SOFT, _FAINT, _LINE = "#010101", "#020202", "#030303", "#040404"
_SERIES = [f"#0505{i:02x}" for i in range(COLOURS)]
_VARIABLES = {
    _INK: "var(--ink)",
    _SOFT: "var(--soft)",
    _FAINT: "var(--faint)",
    _LINE: "var(--line)",
    **{colour: f"var(--s{i})" for i, colour in enumerate(_SERIES)},
}
_STYLE = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a name may hold a dollar sign
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.spines.bottom": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "grid.linewidth": 1.0,
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.major.pad": 6,
    "ytick.major.pad": 6,
    "font.size": 10.5,
}


@dataclass(frozen=True)
class Series:
    """A curve: points in the order of x, and the place of its colour."""

    label: str
    points: list[tuple[float, float]]
    colour: int = 0
    baseline: float | None = None  # a level to compare with, drawn dashed
    marks: tuple[float, ...] = ()  # where the run went on after a stop


class _Tips:
    """What a browser shows over a part of a drawing, by the id that the part has until it is on the page."""

    def __init__(self) -> None:
        self._texts: list[str] = []

    def add(self, text: str) -> str:
        self._texts.append(text)
        return f"tip{len(self._texts) - 1}"

    def put_into(self, svg: str) -> str:
        return re.sub(
            r'<g id="tip(\d+)">', lambda m: f"<g><title>{escape(self._texts[int(m[1])])}</title>", svg
        )


def line_chart(series: Sequence[Series], *, title: str, format_fn: Callable[[float], str]) -> Chart:
    """Return a chart of curves. Those without points are left out; there must be one with some."""
    drawn = [one for one in series if one.points]
    tips = _Tips()

    def draw(axes: Any) -> None:
        _set_scales(axes, drawn, format_fn)
        for one in drawn:
            color = _SERIES[one.colour % COLOURS]
            for mark in one.marks:
                tip = tips.add(f"went on at step {mark:,.0f}")
                axes.axvline(mark, color=_FAINT, linewidth=1, linestyle=":", gid=tip)
            if one.baseline is not None:
                tip = tips.add(f"{one.label}: frozen backbone")
                axes.axhline(one.baseline, color=color, linewidth=1.2, linestyle="--", gid=tip)
            axes.plot(
                *zip(*one.points, strict=True),
                color=color,
                linewidth=1.6,
                linestyle="-" if one.colour < COLOURS else "-.",
                marker="o" if len(one.points) <= _MAX_DOTS else None,
                markersize=4,
                gid=tips.add(one.label),
                clip_on=False,
            )

    summary = "; ".join(f"{one.label}: {format_fn(one.points[-1][1])} at the end" for one in drawn)
    box = (54 / _WIDTH, 22 / _HEIGHT, 280 / _WIDTH, 138 / _HEIGHT)
    svg = _svg(draw, (_WIDTH, _HEIGHT), box=box, title=f"{title}. {summary}", css="chart", tips=tips)
    return Chart(svg, title, format_fn(drawn[0].points[-1][1]) if len(drawn) == 1 else "")


def _set_scales(axes: Any, drawn: Sequence[Series], format_fn: Callable[[float], str]) -> None:
    """Set round ticks that enclose every value and level; steps begin at 0."""
    ticker = require("matplotlib.ticker", "matplotlib", extra="report")
    xs = [x for one in drawn for x, _ in one.points]
    ys = [y for one in drawn for _, y in one.points]
    ys += [one.baseline for one in drawn if one.baseline is not None]
    low, high = min(ys), max(ys)
    if math.isclose(low, high, rel_tol=1e-12):
        margin = 0.1 * abs(high)
        low, high = (low - margin, high + margin) if margin else (0.0, 1.0)
    ticks = ticker.MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    axes.set_ylim(ticks[0], ticks[-1])
    axes.set_yticks(ticks, [format_fn(float(f"{tick:.12g}")) for tick in ticks])
    first = 0.0 if min(xs) >= 0 else min(xs)
    axes.set_xlim(first, max(xs) if max(xs) > first else first + 1)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(lambda value, _: _step(value))


def _step(value: float) -> str:
    if value >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if value >= 1e4 else f"{value:,g}"


def dendrogram(linkage: Sequence[Sequence[float]], order: Sequence[int], labels: Sequence[str]) -> Chart:
    """Return a drawing of a tree: leaves in the order given from top to bottom, distances to the left.

    Args:
        linkage: as scipy's: (a, b, distance, ...) of each join; a join's own number follows the leaves'.
    """
    row, width, left = 22, 220, 8
    size = (width + round(max(map(len, labels)) * 7.4) + 12, row * len(labels) + 18)
    highest = max(float(link[2]) for link in linkage) or 1.0

    def across(distance: float) -> float:
        return left + (width - left) * (1 - distance / highest)

    def draw(axes: Any) -> None:
        axes.set(xlim=(0, size[0]), ylim=(size[1], 0))
        axes.axis("off")
        places = {leaf: (across(0.0), row * (i + 0.5)) for i, leaf in enumerate(order)}
        for number, (a, b, distance, *_) in enumerate(linkage):
            (xa, ya), (xb, yb) = places[int(a)], places[int(b)]
            x = across(float(distance))
            axes.plot([xa, x, x, xb], [ya, ya, yb, yb], color=_SOFT, linewidth=1.2)
            places[len(labels) + number] = (x, (ya + yb) / 2)
        for i, leaf in enumerate(order):
            axes.text(width + 6, row * (i + 0.5), labels[leaf], color=_INK, fontsize=12, va="center")
        for distance, side in ((highest, "left"), (0.0, "center")):
            axes.text(across(distance), size[1] - 4, f"{distance:.2f}", color=_SOFT, fontsize=10, ha=side)

    title = "Dendrogram: average linkage over 1 - phi"
    return Chart(_svg(draw, size, box=(0, 0, 1, 1), title=title, css="tree", tips=_Tips()))


def _svg(
    draw: Callable[[Any], None],
    size: tuple[int, int],
    *,
    box: tuple[float, float, float, float],
    title: str,
    css: str,
    tips: _Tips,
) -> str:
    """Return a drawing as an element of a page: the same bytes for the same drawing, and no address in it.

    Args:
        size: width and height in CSS pixels. box: of the axes in it, as shares: left, bottom, width, height.
        title: what the drawing shows, for readers who do not see it.
    """
    matplotlib = require("matplotlib", "matplotlib", extra="report", needed_by="selfmask report")
    figures = require("matplotlib.figure", "matplotlib", extra="report")
    stream = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": title}):
        figure = figures.Figure(figsize=(size[0] / 72, size[1] / 72), dpi=72)
        draw(figure.add_axes(box))
        about = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(stream, format="svg", transparent=True, metadata=about)
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = svg[svg.index(">") + 1 :]  # its own head has addresses of name spaces, which HTML needs not
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = tips.put_into(svg)
    svg = re.sub(r' id="(?![mp][0-9a-f]{10}")[^"]*"', "", svg)  # those of marks and clips are referred to
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)  # the page's own letters
    svg = re.sub(r"#0[0-9a-f]{5}\b", lambda m: _VARIABLES.get(m[0], m[0]), svg)
    svg = re.sub(r">\s+<", "><", svg)
    width = f' width="{size[0]}"' if css == "tree" else ""
    head = f'<svg viewBox="0 0 {size[0]} {size[1]}"{width} role="img" class="{css}">'
    return f"{head}<title>{escape(title)}</title>{svg.strip()}"
