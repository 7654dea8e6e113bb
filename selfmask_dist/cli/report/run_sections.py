"""What the runs are, and what they took: states, clusters, telemetry, sizes, settings."""

from collections.abc import Mapping, Sequence
from typing import Any

from selfmask_dist.cli.report import paper
from selfmask_dist.cli.report.curve_sections import TELEMETRY, figures_of
from selfmask_dist.cli.report.parts import (
    Cell,
    CellTable,
    Fold,
    PageSection,
    Part,
    SideBySide,
    Text,
    bar,
    mapping,
    named,
    numeric,
    picture,
    section,
    state_badge,
    table,
)
from selfmask_dist.cli.report.reading import Run, median_of, seconds_of
from selfmask_dist.common import names
from selfmask_dist.common.text import NONE, compact, count, duration, number, percent, size


def runs_table(runs: Sequence[Run]) -> PageSection | None:
    """Return a table with a line for each run: what it trains on which data, and how far it is."""
    head = ["run", "state", "method", "backbone", "data", "step", "loss", "images/s", "wall time", "restarts"]
    return section("Runs", table(head, [_run_row(run) for run in runs]))


def verdicts(runs: Sequence[Run]) -> PageSection | None:
    """Return what speaks against the results of runs, in the words they ended with."""
    lines: list[list[Text]] = []
    for run in runs:
        entries = run.result.get("verdict")
        for entry in entries if isinstance(entries, list) else ():
            name, text = (str(mapping(entry).get(key, NONE)) for key in ("name", "text"))
            lines.append([named(run), name, Cell(text, "text")])
    return section("Verdict", table(["run", "what", ""], lines)) if lines else None


def _run_row(run: Run) -> list[Text]:
    objective = run.setting("objective", "name")
    return [
        named(run),
        state_badge(run),
        f"{run.method}, {objective}" if objective and run.method not in ("frozen", "probe") else run.method,
        str(run.setting("backbone", "name") or NONE),
        str(run.setting("data", "train") or NONE),
        numeric(run.status["step"].replace("/", " / ")),
        numeric(run.status["loss"]),
        numeric(run.status["images/s"]),
        numeric(duration(seconds_of(run))),
        numeric(run.status["restarts"]),
    ]


def clusters(runs: Sequence[Run]) -> PageSection | None:
    """Return the clusters of each cascade's router, and the cascade's picture."""
    parts: list[Part | None] = []
    for run in runs:
        if not run.clusters:
            continue
        total = sum(run.clusters) or 1
        planned = next((e.get("steps") for e in reversed(run.events) if e.get("event") == "experts"), None)
        steps = dict(enumerate(planned)) if isinstance(planned, list) else {}
        lines: list[list[Text]] = []
        for k, images in enumerate(run.clusters):
            share = bar(images / total, percent(images / total))
            lines.append([f"expert {k}", numeric(count(images)), share, numeric(count(steps.get(k)))])
        parts.append(table(["cluster", "training images", "share", "steps"], lines, caption=run.label))
        parts.append(picture(run, names.CASCADE_PICTURE))
    return section("Clusters", *parts)


def telemetry(runs: Sequence[Run]) -> PageSection | None:
    """Return speed, memory, waiting, stops and checkpoints of every run that trained."""
    trained = [stage for run in runs for stage in run.with_stages()]
    head = [
        "run", "processes", "images/s, median", "data wait, median", "peak memory", "wall time",
        "stops", "checkpoints", "a save takes", "training stalled by saving", "broken images",
    ]  # fmt: skip
    figures = figures_of(trained, TELEMETRY)
    return section(
        "Telemetry",
        table(head, [_telemetry_row(run) for run in trained], css="wide"),
        SideBySide("charts", figures) if figures else None,
        *[_timeline(run) for run in runs],
        note="Memory: of the main process, on its GPU if it has one, else resident. Wall time counts pauses.",
    )


def _telemetry_row(run: Run) -> list[Text]:
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
    return [named(run), *map(numeric, texts)]


def _timeline(run: Run) -> Fold | None:
    events = [event for event in run.events if number(event.get("time")) is not None]
    if not events:
        return None
    first = events[0]["time"]
    lines: list[list[Text]] = []
    for event in events[-200:]:
        rest = {key: value for key, value in event.items() if key not in ("event", "time")}
        text = ", ".join(f"{key} {_brief(value)}" for key, value in rest.items())
        lines.append([f"+ {duration(event['time'] - first)}", str(event["event"]), Cell(text, "text")])
    return Fold(f"Events of {run.label} ({len(events)})", table(["time", "event", ""], lines))


def _brief(value: Any) -> str:
    text = compact(value) if isinstance(value, float) else str(value)
    return text if len(text) < 300 else f"{text[:297]}..."


def sizes(runs: Sequence[Run]) -> PageSection | None:
    """Return what is stored for the task, and what a checkpoint takes."""
    every = [one for run in runs for one in (run, *run.stages)]
    lines: list[list[Text]] = [_size_row(run) for run in every if run.result.get("mask") or run.checkpoints]
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
    return section("Sizes", table(head, lines, css="wide"), note=note)


def _size_row(run: Run) -> list[Text]:
    mask = mapping(run.result.get("mask"))
    stored, bits, active = (number(mask.get(name)) for name in ("bytes", "bits_per_weight", "active"))
    weights, raw = number(mask.get("masked_weights")), number(mask.get("weight_bytes"))
    saved = run.checkpoints[-1].num_bytes if run.checkpoints else None
    return [
        named(run),
        numeric(size(stored)),
        numeric(count(weights)),
        numeric(NONE if active is None else percent(1 - active)),
        numeric(NONE if bits is None else f"{bits:.3f}"),
        numeric(size(raw)),
        numeric(NONE if not stored or raw is None else f"{raw / stored:.1f}"),
        numeric(size(saved)),
        numeric(NONE if not weights or saved is None else f"{saved / weights:.2f}"),
        numeric(count(len(run.checkpoints))),
    ]


def settings(runs: Sequence[Run]) -> PageSection | None:
    """Return where the configurations differ, then each whole one, folded."""
    flat = [_flat(run.config) for run in runs]
    keys = dict.fromkeys(key for values in flat for key in values)
    apart = [key for key in keys if len({str(values.get(key, NONE)) for values in flat}) > 1]
    lines: list[list[Text]] = [
        [key, *(Cell(str(values.get(key, NONE)), "text") for values in flat)] for key in apart
    ]
    head: list[Text] = ["setting", *map(named, runs)]
    return section(
        "Settings",
        table(head, lines, caption="Where they differ") if lines else None,
        *[Fold(f"{names.CONFIG} of {run.label}", run.config_text) for run in runs],
        *[Fold(f"Environment of {run.label}", _environment(run)) for run in runs if run.environment],
    )


def _environment(run: Run) -> CellTable:
    rows: list[list[Text]] = [
        [key, Cell(_plain(value), "text")] for key, value in _flat(run.environment).items()
    ]
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
