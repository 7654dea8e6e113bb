"""Curves and dendrograms as inline SVG, coloured by the page's style."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from selfmask_dist.cli.report.markup import Html, join, tag

COLOURS = 8
_WIDTH, _HEIGHT = 344, 168
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 10, 8, 22
_MAX_POINTS = 240  # drawn of a curve; of more, the smallest and largest of every stretch
_MAX_DOTS = 24


@dataclass(frozen=True)
class Series:
    """A curve: points in the order of x, and the place of its colour."""

    label: str
    points: list[tuple[float, float]]
    colour: int = 0
    baseline: float | None = None  # a level to compare with, drawn dashed
    marks: tuple[float, ...] = ()  # where the run went on after a stop


def line_chart(series: Sequence[Series], *, title: str, format_fn: Callable[[float], str]) -> Html:
    """One figure. Series without points are left out; there must be one with some."""
    drawn = [one for one in series if one.points]
    xs = [x for one in drawn for x, _ in one.points]
    ys = [y for one in drawn for _, y in one.points]
    ys += [one.baseline for one in drawn if one.baseline is not None]
    low_x, high_x = (0.0, max(xs)) if min(xs) >= 0 else (min(xs), max(xs))
    ticks_y = ticks(min(ys), max(ys))
    low_y, high_y = min(ticks_y[0], *ys), max(ticks_y[-1], *ys)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - low_x) / ((high_x - low_x) or 1)
        up = (y - low_y) / ((high_y - low_y) or 1)
        return (
            round(_LEFT + across * (_WIDTH - _LEFT - _RIGHT), 1),
            round(_HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM), 1),
        )

    parts = [_axis_y(ticks_y, place(low_x, 0)[0], lambda y: place(low_x, y)[1], format_fn)]
    parts.append(_axis_x(low_x, high_x, lambda x: place(x, low_y)[0]))
    for one in drawn:
        for mark in one.marks:
            x = place(mark, low_y)[0]
            line = {"x1": x, "x2": x, "y1": _TOP, "y2": _HEIGHT - _BOTTOM}
            parts.append(tag("line", tag("title", f"went on at step {mark:,.0f}"), class_="mark", **line))
        if one.baseline is not None:
            parts.append(_baseline(one, place(low_x, one.baseline)[1]))
        parts.append(_curve(one, place))
    last = format_fn(drawn[0].points[-1][1]) if len(drawn) == 1 else None
    summary = "; ".join(f"{one.label}: {format_fn(one.points[-1][1])} at the end" for one in drawn)
    return tag(
        "figure",
        tag("figcaption", title, None if last is None else tag("b", last)),
        tag(
            "svg",
            tag("title", f"{title}. {summary}"),
            parts,
            viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
            role="img",
            class_="chart",
        ),
        class_="chart",
    )


def _baseline(one: Series, y: float) -> Html:
    return tag(
        "line",
        tag("title", f"{one.label}: frozen backbone"),
        class_=f"base s{one.colour % COLOURS}",
        x1=_LEFT,
        x2=_WIDTH - _RIGHT,
        y1=y,
        y2=y,
    )


def _curve(one: Series, place: Callable[[float, float], tuple[float, float]]) -> Html:
    colour = f"s{one.colour % COLOURS}" + (" again" if one.colour >= COLOURS else "")
    places = [place(*point) for point in thinned(one.points)]
    text = " ".join(f"{x},{y}" for x, y in places)
    label = tag("title", one.label)
    line = tag("polyline", label, points=text, class_=f"line {colour}") if len(places) > 1 else None
    dots = places if len(places) <= _MAX_DOTS else []
    return join(line, [tag("circle", cx=x, cy=y, r=2, class_=f"dot {colour}") for x, y in dots])


def _axis_y(
    values: Sequence[float], left: float, place: Callable[[float], float], format_fn: Callable[[float], str]
) -> Html:
    parts = []
    for value in values:
        y = place(value)
        parts.append(tag("line", class_="grid", x1=left, x2=_WIDTH - _RIGHT, y1=y, y2=y))
        parts.append(tag("text", format_fn(value), x=left - 6, y=y + 3, text_anchor="end"))
    return join(parts)


def _axis_x(low: float, high: float, place: Callable[[float], float]) -> Html:
    parts = []
    for value in ticks(low, high, 5):
        if low <= value <= high:
            x = place(value)
            anchor = "end" if x > _WIDTH - _RIGHT - 12 else "middle"
            parts.append(tag("text", _step(value), x=x, y=_HEIGHT - 7, text_anchor=anchor))
    return join(parts)


def _step(value: float) -> str:
    if value >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if value >= 1e4 else f"{value:,g}"


def ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round values from at most `low` to at least `high`, about `wanted` steps apart."""
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
        margin = abs(high) * 0.1
        low, high = (low - margin, high + margin) if margin else (0.0, 1.0)
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `_MAX_POINTS` points, with every peak and trough."""
    if len(points) <= _MAX_POINTS:
        return list(points)
    kept: list[tuple[float, float]] = []
    stretch = math.ceil(2 * len(points) / _MAX_POINTS)
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return [points[0], *[point for point in kept if points[0][0] < point[0] < points[-1][0]], points[-1]]


def dendrogram(linkage: Sequence[Sequence[float]], order: Sequence[int], labels: Sequence[str]) -> Html:
    """Leaves in the order given from top to bottom, distances from right to left."""
    row, width, left = 22, 220, 8
    text = max(map(len, labels)) * 7.4 + 12
    highest = max(float(link[2]) for link in linkage) or 1.0
    height = row * len(labels) + 18

    def across(distance: float) -> float:
        return round(left + (width - left) * (1 - distance / highest), 1)

    places = {leaf: (across(0.0), row * (i + 0.5)) for i, leaf in enumerate(order)}
    parts: list[Html] = []
    for number, (a, b, distance, *_) in enumerate(linkage):
        (xa, ya), (xb, yb) = places[int(a)], places[int(b)]
        x = across(float(distance))
        parts.append(tag("path", d=f"M{xa},{ya}H{x}V{yb}H{xb}", class_="link"))
        places[len(labels) + number] = (x, (ya + yb) / 2)
    for i, leaf in enumerate(order):
        parts.append(tag("text", labels[leaf], x=width + 6, y=row * (i + 0.5) + 4))
    for distance, anchor in ((highest, "start"), (0.0, "middle")):
        place = {"x": across(distance), "y": height - 4, "text_anchor": anchor}
        parts.append(tag("text", f"{distance:.2f}", class_="small", **place))
    total = width + text
    return tag(
        "svg",
        tag("title", "Dendrogram: average linkage over 1 - phi"),
        parts,
        viewBox=f"0 0 {total:.0f} {height}",
        width=f"{total:.0f}",
        role="img",
        class_="tree",
    )
