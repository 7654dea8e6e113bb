"""The parts of a report, each a function from runs to markup, or None where there is nothing to say."""

import base64
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from selfmask_dist.report import paper
from selfmask_dist.report.charts import COLOURS, Series, line_chart
from selfmask_dist.report.markup import Child, Html, join, table, tag
from selfmask_dist.report.numbers import (
    NONE,
    accuracy,
    compact,
    count,
    duration,
    number,
    percent,
    size,
)
from selfmask_dist.report.reading import Run, median_of, seconds_of

_MEASURES = {"probe": "linear probe", "head": "own head", "zeroshot": "zero-shot"}


def section(title: str, *content: Child, note: Child = None) -> Html | None:
    """A part of the page under a heading; None where it has no content."""
    parts = [part for part in content if part]
    if not parts:
        return None
    anchor = re.sub(r"\W+", "-", title.lower())
    lead = None if note is None else tag("p", note, class_="note")
    return tag("section", tag("h2", title), lead, parts, id=anchor)


# ---- what the runs are


def runs_table(runs: Sequence[Run]) -> Html | None:
    """One line for each run, with what it trains on what, and how far it is."""
    head = ["run", "state", "method", "backbone", "data", "step", "loss", "images/s", "wall time", "restarts"]
    return section("Runs", table(head, [_run_row(run) for run in runs]))


def _run_row(run: Run) -> list[Child]:
    objective = run.setting("objective", "name")
    return [
        named(run),
        state_badge(run),
        f"{run.method}, {objective}" if objective and run.method not in ("frozen", "probe") else run.method,
        str(run.setting("backbone", "name") or NONE),
        str(run.setting("data", "train") or NONE),
        _numeric(run.status["step"].replace("/", " / ")),
        _numeric(run.status["loss"]),
        _numeric(run.status["images/s"]),
        _numeric(duration(seconds_of(run))),
        _numeric(run.status["restarts"]),
    ]


def state_badge(run: Run) -> Html:
    state = "failed" if run.error else run.state
    stage = run.heartbeat.get("stage")
    text = f"{state}, {stage}" if stage and state not in ("finished", "failed") else state
    return tag("span", text, class_=f"badge {re.sub('[^a-z]', '-', state)}")


def swatch(colour: int) -> Html:
    return tag("i", class_=f"swatch s{colour % COLOURS}" + (" again" if colour >= COLOURS else ""))


def named(run: Run, view: str | None = None) -> Html:
    """A run's label beside its colour."""
    return join(swatch(run.colour), run.label if view is None else f"{run.label}: {view}")


def complaints(runs: Sequence[Run]) -> Html | None:
    """Failures, and what could not be read."""
    failures = [
        tag("div", tag("b", f"{run.label} failed. "), run.error, class_="alarm") for run in runs if run.error
    ]
    problems = [problem for run in runs for problem in run.every_problem()]
    items = tag("ul", [tag("li", problem) for problem in problems])
    notes = tag("div", tag("b", "Not everything could be read. "), items, class_="warning")
    return join(failures, notes if problems else None) or None


def tiles(run: Run) -> Html | None:
    """The few numbers of one run that matter most."""
    found: list[tuple[str, str, Child]] = []
    views = run.views
    frozen = views.get("frozen", {})
    best = views.get("unconditional") or views.get(run.own_view) or {}
    for measure in [*[name for name in best if name.startswith("knn")][:1], "probe", "head"]:
        if measure in best:
            known = frozen.get(measure)
            note = None if known is None else f"frozen {accuracy(known)} ({_delta(best[measure] - known)})"
            found.append((measure_name(measure), accuracy(best[measure]), note))
    mask = _mapping(run.result.get("mask"))
    active = run.series("mask/active")
    if (kept := number(mask.get("active"))) is not None or active:
        found.append(("weights pruned", percent(1 - (active[-1][1] if kept is None else kept)), _masked(run)))
    if "bytes" in mask:
        bits = number(mask.get("bits_per_weight"))
        note = None if bits is None else f"{bits:.3f} bits per weight"
        found.append(("bundle" if run.clusters else "mask", size(mask["bytes"]), note))
    if speed := run.series("images_per_second"):
        wait = run.series("data_wait")
        note = f"{percent(median_of(wait), 0)} waiting for data" if wait else None
        found.append(("images/s, median", count(median_of(speed)), note))
    if not found:
        return None
    return tag(
        "dl",
        [tag("div", tag("dt", name), tag("dd", value), tag("dd", note or "", class_="sub"))
         for name, value, note in found],
        class_="tiles",
    )  # fmt: skip


def _masked(run: Run) -> str | None:
    weights = number(_mapping(run.result.get("mask")).get("masked_weights"))
    return None if weights is None else f"of {count(weights)}"


# ---- results


def results(runs: Sequence[Run]) -> Html | None:
    """Accuracies of every view beside the frozen backbone's, then the paper's numbers if there are some."""
    rows = [(run, view) for run in runs for view in run.views]
    if not rows:
        return None
    columns = list(dict.fromkeys(name for run, view in rows for name in run.views[view]))
    columns.sort(key=lambda name: not name.startswith("knn"))
    best: dict[tuple[str, str], float] = {}
    for run, view in rows:
        for name, value in run.views[view].items():
            best[_data(run), name] = max(value, best.get((_data(run), name), value))
    lines = []
    for run, view in rows:
        frozen = {} if view == "frozen" else run.views.get("frozen", {})
        values = run.views[view]
        cells = [_value(values.get(name), frozen.get(name), best.get((_data(run), name))) for name in columns]
        lines.append([named(run, view) if len(runs) > 1 else view, *cells])
    note = (
        "Test accuracy; beside it, the difference to the frozen backbone. The best on the same data is bold."
    )
    return section(
        "Results",
        table(["", *map(_measure_head, columns)], lines),
        _paper_table(runs),
        note=f"{note}{_standard_error(runs)}",
    )


def _data(run: Run) -> str:
    return str(run.setting("data", "test"))


def _measure_head(name: str) -> Html:
    return join(measure_name(name), tag("small"))


def _value(value: float | None, frozen: float | None, best: float | None, *, signed: bool = True) -> Html:
    if value is None:
        return tag("td", NONE, tag("small"), class_="n")
    text = tag("b", accuracy(value)) if value == best else accuracy(value)
    delta = "" if frozen is None else _delta(value - frozen)
    sign = _sign(value - frozen) if signed and frozen is not None else None
    return tag("td", text, tag("small", delta, class_=sign), class_="n")


def _delta(difference: float) -> str:
    return f"{difference:+.3f}".replace("-", "−")  # noqa: RUF001 (a minus sign, as wide as the plus)


def _sign(difference: float) -> str | None:
    return None if abs(difference) < 5e-4 else "up" if difference > 0 else "down"


def _standard_error(runs: Sequence[Run]) -> str:
    """At an accuracy of one half, where it is largest."""
    counts = {event["test_samples"] for run in runs for event in run.events if event.get("test_samples")}
    known = [n for n in counts if number(n)]
    if not known:
        return ""
    smallest = min(known)
    return (
        f" With {smallest:,} test images, one standard error of an accuracy is at most "
        f"{0.5 / math.sqrt(smallest):.3f}."
    )


def _paper_table(runs: Sequence[Run]) -> Html | None:
    lines = []
    titles: dict[str, None] = {}
    for run in runs:
        for entry in paper.expected(run.config, run.views):
            here = run.views[entry.view][entry.measure]
            titles[entry.table] = None
            lines.append(
                [named(run, entry.view), measure_name(entry.measure),
                 _numeric(accuracy(here)), _numeric(accuracy(entry.value)),
                 tag("td", _delta(here - entry.value), class_="n")]
            )  # fmt: skip
    if not lines:
        return tag("p", "The paper has no number for this backbone, objective and data.", class_="note")
    caption = f"Beside the paper's numbers, {'; '.join(titles)}. {paper.paper()['source']}"
    return table(["", "measure", "here", "paper", "difference"], lines, caption=caption)


def measure_name(name: str) -> str:
    found = re.fullmatch(r"(?:monitor/)?knn(\d+)(.*)", name)
    return f"k-NN ({found[1]}){found[2]}" if found else _MEASURES.get(name, name)


def evaluations(runs: Sequence[Run]) -> Html | None:
    """What `selfmask eval` left in the runs' folders."""
    parts: list[Child] = []
    for run in runs:
        for found in run.evaluations:
            parts.append(_evaluation(run, found))
            parts.extend(
                _picture(run, f"eval/{name}") for name in found.get("plots", []) if isinstance(name, str)
            )
    return section("Evaluations", *parts)


def _evaluation(run: Run, found: Mapping[str, Any]) -> Html:
    columns = [name for name in found["columns"] if isinstance(name, str)]
    rows = [
        row for row in found["rows"] if isinstance(row, Mapping) and isinstance(row.get("values"), Mapping)
    ]
    baseline: Mapping[str, Any] = next(
        (row["values"] for row in rows if row.get("name") == found.get("baseline")), {}
    )
    lower = _mapping(found.get("settings")).get("lower_is_better") or []
    lines = []
    for row in rows:
        before = {} if row["values"] is baseline else baseline
        cells = []
        for name in columns:
            known = (number(row["values"].get(name)), number(before.get(name)))
            cell = _value(*known, None, signed=name not in lower)
            spread = number(_mapping(row.get("spread")).get(name))
            cells.append(cell if spread is None else _with_spread(cell, spread))
        lines.append([str(row.get("name")), *cells])
    notes = [str(note) for note in found.get("notes", []) if note]
    caption = [tag("b", f"{found.get('kind')}"), f" of {run.label}", _settings(found.get("settings"))]
    return join(
        table(["", *map(_measure_head, columns)], lines, caption=caption),
        tag("p", " ".join(notes), class_="note") if notes else None,
    )


def _with_spread(cell: Html, spread: float) -> Html:
    return Html(cell.removesuffix("</td>") + tag("small", f"± {spread:.3f}") + "</td>")


def _settings(settings: Any) -> str:
    if not isinstance(settings, Mapping) or not settings:
        return ""
    text = "; ".join(f"{key} {value}" for key, value in settings.items())
    return f" ({text if len(text) < 200 else text[:197] + '...'})"


# ---- curves

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
_TELEMETRY: tuple[_Curve, ...] = (
    ("images_per_second", "Images per second", _short),
    ("data_wait", "Time spent waiting for data", _percent_tick),
    ("memory_mib", "Peak memory of the main process, MiB", _short),
)
_NOT_CURVES = ("step", "time", "epoch", "mask/active", "quarantined")


def curves(runs: Sequence[Run]) -> Html | None:
    """Every metric over the steps; a cascade's stages each have a curve."""
    trained = [stage for run in runs for stage in run.with_stages()]
    known = {
        name for run in trained for line in run.metrics for name in line if number(line[name]) is not None
    }
    shown = _expand(_LEARNING, known)
    rest = known - {name for name, _, _ in (*shown, *_TELEMETRY)} - set(_NOT_CURVES)
    figures = _figures(trained, [*shown, *((name, name, _short) for name in sorted(rest))])
    if not figures:
        return None
    note = "Over training steps. Dashed: the frozen backbone. Dotted and upright: went on after a stop."
    return section("Curves", legend(trained), tag("div", figures, class_="charts"), note=note)


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
            found.append((metric, shown, format_fn))
    return found


def _figures(runs: Sequence[Run], charts: Iterable[_Curve]) -> list[Html]:
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


def legend(runs: Sequence[Run]) -> Html | None:
    if len(runs) < 2:
        return None
    return tag("p", [tag("span", named(run)) for run in runs], class_="legend")


# ---- a cascade's clusters


def clusters(runs: Sequence[Run]) -> Html | None:
    """The router's clusters and the cascade's picture."""
    parts: list[Child] = []
    for run in runs:
        if not run.clusters:
            continue
        total = sum(run.clusters) or 1
        steps = next((e.get("steps") for e in reversed(run.events) if e.get("event") == "experts"), None)
        steps = (
            steps
            if isinstance(steps, list) and len(steps) == len(run.clusters)
            else [None] * len(run.clusters)
        )
        lines = [
            [f"expert {k}", _numeric(count(images)), bar(images / total, percent(images / total)),
             _numeric(count(steps[k]))]
            for k, images in enumerate(run.clusters)
        ]  # fmt: skip
        parts.append(table(["cluster", "training images", "share", "steps"], lines, caption=run.label))
        parts.append(_picture(run, "cascade.png"))
    return section("Clusters", *parts)


def bar(share: float, text: str) -> Html:
    width = f"width:{max(0.0, min(share, 1.0)) * 100:.1f}%"
    return tag("td", tag("span", tag("i", style=width), class_="bar"), text, class_="n")


def _picture(run: Run, name: str) -> Html | None:
    path = run.path / name
    try:
        data = path.read_bytes()
    except OSError:
        return None
    if not path.resolve().is_relative_to(run.path.resolve()) or not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return None
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return tag("figure", tag("img", src=source, alt=f"{name} of {run.label}"), class_="picture")


# ---- telemetry and sizes


def telemetry(runs: Sequence[Run]) -> Html | None:
    """Speed, memory, waiting, stops and checkpoints, of every run that trained."""
    trained = [stage for run in runs for stage in run.with_stages()]
    head = [
        "run", "processes", "images/s, median", "data wait, median", "peak memory", "wall time",
        "stops", "checkpoints", "a save takes", "training stalled by saving", "broken images",
    ]  # fmt: skip
    figures = _figures(trained, _TELEMETRY)
    return section(
        "Telemetry",
        table(head, [_telemetry_row(run) for run in trained], class_="wide"),
        tag("div", figures, class_="charts") if figures else None,
        [_timeline(run) for run in runs],
        note="Memory: of the main process, on its GPU if it has one, else resident. Wall time counts pauses.",
    )


def _telemetry_row(run: Run) -> list[Child]:
    saves = [event for event in run.events if event.get("event") == "checkpoint"]
    seconds = [(0.0, value) for event in saves if (value := number(event.get("seconds"))) is not None]
    stalled = max((number(event.get("stalled")) or 0.0 for event in saves), default=None)
    sizes = [event.get("world_size") for event in run.events if event.get("event") == "start"]
    memory = [value * 2**20 for _, value in run.series("memory_mib")]
    stops = sum(event.get("event") == "preempted" for event in run.events)
    wait, broken = median_of(run.series("data_wait")), run.series("quarantined")
    texts = [
        count(sizes[-1]) if sizes else NONE,
        count(median_of(run.series("images_per_second"))),
        percent(wait),
        size(max(memory, default=None)),
        duration(seconds_of(run)),
        count(stops),
        count(len(saves)),
        duration(median_of(seconds)) if seconds else NONE,
        NONE if stalled is None else duration(stalled),
        count(broken[-1][1]) if broken else "0",
    ]
    return [named(run), *map(_numeric, texts)]


def _timeline(run: Run) -> Html | None:
    events = [event for event in run.events if number(event.get("time")) is not None]
    if not events:
        return None
    first = events[0]["time"]
    lines = []
    for event in events[-200:]:
        rest = {key: value for key, value in event.items() if key not in ("event", "time")}
        text = ", ".join(f"{key} {_brief(value)}" for key, value in rest.items())
        lines.append(
            [f"+ {duration(event['time'] - first)}", str(event["event"]), tag("td", text, class_="text")]
        )
    return fold(f"Events of {run.label} ({len(events)})", table(["time", "event", ""], lines))


def _brief(value: Any) -> str:
    text = compact(value) if isinstance(value, float) else str(value)
    return text if len(text) < 300 else f"{text[:297]}..."


def sizes(runs: Sequence[Run]) -> Html | None:
    """What is stored for the task, and what a checkpoint takes."""
    every = [one for run in runs for one in (run, *run.stages)]
    lines = [_size_row(run) for run in every if run.result.get("mask") or run.checkpoints]
    if not lines:
        return None
    head = [
        "run", "file", "masked weights", "pruned", "bits per weight", "the weights themselves",
        "weights / file", "a checkpoint", "bytes per masked weight", "kept checkpoints",
    ]  # fmt: skip
    stored = paper.paper()["storage"]
    note = (
        f"The paper stores {stored['raw']:g} bit per weight raw and {stored['compressed']:g} compressed "
        f"({stored['setting']})."
    )
    return section("Sizes", table(head, lines, class_="wide"), note=note)


def _size_row(run: Run) -> list[Child]:
    mask = _mapping(run.result.get("mask"))
    stored, bits, active = (number(mask.get(name)) for name in ("bytes", "bits_per_weight", "active"))
    weights, raw = number(mask.get("masked_weights")), number(mask.get("weight_bytes"))
    saved = run.checkpoints[-1].num_bytes if run.checkpoints else None
    return [
        named(run),
        _numeric(size(stored)),
        _numeric(count(weights)),
        _numeric(NONE if active is None else percent(1 - active)),
        _numeric(NONE if bits is None else f"{bits:.3f}"),
        _numeric(size(raw)),
        _numeric(NONE if not stored or raw is None else f"{raw / stored:.1f}"),
        _numeric(size(saved)),
        _numeric(NONE if not weights or saved is None else f"{saved / weights:.2f}"),
        _numeric(count(len(run.checkpoints))),
    ]


# ---- settings


def settings(runs: Sequence[Run]) -> Html | None:
    """Where the configurations differ, then each whole one, folded."""
    flat = [_flat(run.config) for run in runs]
    keys = dict.fromkeys(key for values in flat for key in values)
    apart = [key for key in keys if len({str(values.get(key, NONE)) for values in flat}) > 1]
    lines = [
        [key, *(tag("td", str(values.get(key, NONE)), class_="text") for values in flat)] for key in apart
    ]
    head = ["setting", *map(named, runs)]
    return section(
        "Settings",
        table(head, lines, caption="Where they differ") if lines else None,
        [fold(f"config.yaml of {run.label}", tag("pre", run.config_text)) for run in runs],
        [fold(f"Environment of {run.label}", _environment(run)) for run in runs if run.environment],
    )


def _environment(run: Run) -> Html:
    rows = [[key, tag("td", _plain(value), class_="text")] for key, value in _flat(run.environment).items()]
    return table(["", ""], rows)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        is_section = isinstance(value, Mapping) and value and name not in ("backbone.kwargs",)
        found |= _flat(value, f"{name}.") if is_section else {name: value}
    return found


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def fold(title: Child, content: Child) -> Html:
    return tag("details", tag("summary", title), content)


def _numeric(text: str) -> Html:
    return tag("td", NONE if text == "-" else text, class_="n")


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
