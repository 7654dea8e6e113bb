"""What was measured: beside the frozen backbone, beside the paper, and by `selfmask eval`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from selfmask_dist.cli.report import paper
from selfmask_dist.cli.report.markup import Child, Html, join, table, tag
from selfmask_dist.cli.report.parts import mapping, measure_name, named, numeric, picture, section
from selfmask_dist.cli.report.reading import Run, median_of
from selfmask_dist.common.text import NONE, accuracy, count, number, percent, size


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
    mask = mapping(run.result.get("mask"))
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
    weights = number(mapping(run.result.get("mask")).get("masked_weights"))
    return None if weights is None else f"of {count(weights)}"


def results(runs: Sequence[Run]) -> Html | None:
    """Accuracies of every view beside the frozen backbone's, then the paper's numbers if there are some."""
    rows = [(run, view) for run in runs for view in run.views]
    if not rows:
        return None
    columns = list(dict.fromkeys(name for run, view in rows for name in run.views[view]))
    columns.sort(key=lambda name: not name.startswith("knn"))
    found: dict[tuple[str, str], list[float]] = {}
    for run, view in rows:
        for name, value in run.views[view].items():
            found.setdefault((_data(run), name), []).append(value)
    best = {key: max(values) for key, values in found.items() if len(values) > 1}
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
    counts = [number(event.get("test_samples")) for run in runs for event in run.events]
    smallest = min((n for n in counts if n and n > 0), default=None)
    if smallest is None:
        return ""
    return (
        f" With {count(smallest)} test images, one standard error of an accuracy is at most "
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
                 numeric(accuracy(here)), numeric(accuracy(entry.value)),
                 tag("td", _delta(here - entry.value), class_="n")]
            )  # fmt: skip
    if not lines:
        return tag("p", "The paper has no number for this backbone, objective and data.", class_="note")
    caption = f"Beside the paper's numbers, {'; '.join(titles)}. {paper.paper()['source']}"
    return table(["", "measure", "here", "paper", "difference"], lines, caption=caption)


def evaluations(runs: Sequence[Run]) -> Html | None:
    """What `selfmask eval` left in the runs' folders."""
    parts: list[Child] = []
    for run in runs:
        for found in run.evaluations:
            parts.append(_evaluation(run, found))
            parts.extend(
                picture(run, f"eval/{name}") for name in found.get("plots") or () if isinstance(name, str)
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
    lower = mapping(found.get("settings")).get("lower_is_better") or []
    lines = []
    for row in rows:
        before = {} if row["values"] is baseline else baseline
        cells = []
        for name in columns:
            known = (number(row["values"].get(name)), number(before.get(name)))
            cell = _value(*known, None, signed=name not in lower)
            spread = number(mapping(row.get("spread")).get(name))
            cells.append(cell if spread is None else _with_spread(cell, spread))
        lines.append([str(row.get("name")), *cells])
    notes = [str(note) for note in found.get("notes") or () if note]
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
