"""Metrics over the steps."""

from collections.abc import Callable, Iterable, Sequence

from selfmask_dist.cli.report.charts import Series, line_chart
from selfmask_dist.cli.report.parts import (
    Chart,
    PageSection,
    SideBySide,
    legend,
    measure_name,
    section,
)
from selfmask_dist.cli.report.reading import Run
from selfmask_dist.common.text import compact, number

_Curve = tuple[str, str, Callable[[float], str]]  # metric, title, how its values read


def _short(value: float) -> str:
    return compact(value) if value else "0"


def _percent_tick(value: float) -> str:
    shown = 100 * value
    return f"{shown:.3g} %" if abs(shown) < 100 else f"{shown:.0f} %"


_LEARNING: tuple[_Curve, ...] = (
    ("loss", "Loss", _short),
    ("accuracy", "Accuracy on training batches", _percent_tick),
    ("monitor/*", "", _percent_tick),
    ("pruned", "Weights pruned", _percent_tick),
    ("mask/flips", "Mask bits that flip in a step", _percent_tick),
    ("mask/near_threshold", "Scores near the threshold", _percent_tick),
    ("concentration", "Concentration of the embeddings", _short),
    ("queue", "Queue, filled", _percent_tick),
    ("lr/*", "", _short),
)
TELEMETRY: tuple[_Curve, ...] = (
    ("images_per_second", "Images per second", _short),
    ("data_wait", "Time spent waiting for data", _percent_tick),
    ("memory_mib", "Peak memory of the process that needs most, MiB", _short),
)
_NOT_CURVES = ("step", "time", "epoch", "mask/active", "quarantined")


def curves(runs: Sequence[Run]) -> PageSection | None:
    """Return a chart of every metric over the steps; a cascade's stages each have a curve."""
    trained = [stage for run in runs for stage in run.with_stages()]
    known = {
        name for run in trained for line in run.metrics for name in line if number(line[name]) is not None
    }
    shown = _expand(_LEARNING, known)
    rest = known - {name for name, _, _ in (*shown, *TELEMETRY)} - set(_NOT_CURVES)
    figures = figures_of(trained, [*shown, *((name, name, _short) for name in sorted(rest))])
    if not figures:
        return None
    note = (
        "Over training steps. A dashed line is the frozen backbone; an upright dotted one is where a run "
        "went on after a stop."
    )
    return section("Curves", legend(trained), SideBySide("charts", figures), note=note)


def _expand(charts: Iterable[_Curve], known: set[str]) -> list[_Curve]:
    found: list[_Curve] = []
    for name, title, format_fn in charts:
        if not name.endswith("*"):
            found.append((name, title, format_fn))
            continue
        for metric in sorted(metric for metric in known if metric.startswith(name[:-1])):
            rest = metric.removeprefix(name[:-1])
            is_rate = name == "lr/*"
            shown = f"Learning rate, {rest}" if is_rate else f"{measure_name(metric)} on test images"
            if rest == "instance_retrieval":
                shown = "Instance retrieval on training images"
            found.append((metric, shown, format_fn))
    return found


def figures_of(runs: Sequence[Run], charts: Iterable[_Curve]) -> list[Chart]:
    """Return a chart for each metric that some run has."""
    figures = []
    for metric, title, format_fn in charts:
        series = [_series(run, metric) for run in runs]
        if any(one.points for one in series):
            figures.append(line_chart(series, title=title, format_fn=format_fn))
    return figures


def _series(run: Run, metric: str) -> Series:
    if metric == "pruned":
        points = [(step, 1 - active) for step, active in run.series("mask/active")]
    else:
        points = run.series(metric)
    marks = tuple(
        float(event["step"])
        for event in run.events
        if event.get("event") == "resume" and number(event.get("step")) is not None
    )
    baseline = (
        run.views.get("frozen", {}).get(metric.removeprefix("monitor/")) if "monitor/" in metric else None
    )
    return Series(run.label, points, run.colour, baseline, marks)
