"""What was measured: beside the frozen backbone, beside the paper, and by `selfmask eval`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from selfmask_dist.cli.report import paper
from selfmask_dist.cli.report.parts import (
    Cell,
    CellTable,
    PageSection,
    Paragraph,
    Part,
    Text,
    in_order,
    mapping,
    measure_name,
    named,
    numeric,
    picture,
    section,
    table,
)
from selfmask_dist.cli.report.reading import Run, median_of
from selfmask_dist.common import names
from selfmask_dist.common.text import NONE, accuracy, compact, count, number, percent, size
from selfmask_dist.runs.decision import decision_text, mark_of

RETRIEVAL = "instance_retrieval"
# settings in the files of earlier versions that say nothing to a reader
_INTERNAL = ("not_accuracies", "lower_is_better")


@dataclass(frozen=True)
class Tile:
    """One of the few numbers that matter most, with what it is and what stands beside it."""

    name: str
    value: str
    note: str = ""


def tiles(run: Run) -> list[Tile]:
    """Return the few numbers of one run that matter most, each with whose number it is."""
    found = []
    views = run.views
    frozen = views.get("frozen", {})
    view = "unconditional" if "unconditional" in views else run.own_view  # of a cascade its last stage's
    best = views.get(view, {})
    for measure in [
        *in_order(name for name in best if name.startswith("knn"))[:1],
        "probe",
        "head",
        RETRIEVAL,
    ]:
        if measure in best:
            known = frozen.get(measure)
            note = "" if known is None else f"frozen {accuracy(known)} ({_delta(best[measure] - known)})"
            found.append(Tile(f"{measure_name(measure)}, {view}", accuracy(best[measure]), note))
    mask = mapping(run.result.get("mask"))
    active = run.series("mask/active")
    if (kept := number(mask.get("active"))) is not None or active:
        pruned = percent(1 - (active[-1][1] if kept is None else kept))
        weights = number(mask.get("masked_weights"))
        found.append(Tile("weights pruned", pruned, "" if weights is None else f"of {count(weights)}"))
    if "bytes" in mask:
        bits = number(mask.get("bits_per_weight"))
        note = "" if bits is None else f"{bits:.3f} bits per weight"
        found.append(Tile("bundle" if run.clusters else "mask", size(mask["bytes"]), note))
    if speed := run.series("images_per_second"):
        wait = run.series("data_wait")
        note = f"{percent(median_of(wait), 0)} waiting for data" if wait else ""
        found.append(Tile("images/s, median", count(median_of(speed)), note))
    return found


def results(runs: Sequence[Run]) -> PageSection | None:
    """Return accuracies of every view beside the frozen backbone's, and the paper's numbers if there are
    some.
    """
    rows = [(run, view) for run in runs for view in run.views]
    if not rows:
        return None
    columns = in_order(dict.fromkeys(name for run, view in rows for name in run.views[view]))
    found: dict[tuple[str, str], list[float]] = {}
    for run, view in rows:
        for name, value in run.views[view].items():
            if name != RETRIEVAL:  # it does not rank objectives, some of which train for it
                found.setdefault((_data(run), name), []).append(value)
    best = {key: max(values) for key, values in found.items() if len(values) > 1}
    lines: list[list[Text]] = []
    for run, view in rows:
        frozen = {} if view == "frozen" else run.views.get("frozen", {})
        values = run.views[view]
        cells = [_value(values.get(name), frozen.get(name), best.get((_data(run), name))) for name in columns]
        lines.append([named(run, view) if len(runs) > 1 else Cell(view), *cells])
    under = "under it, the difference to the frozen backbone"
    note = f"Test accuracy; {under}. The best on the same data is bold."
    if columns == [RETRIEVAL]:
        note = f"Instance retrieval, of training images and without labels; {under}."
    elif RETRIEVAL in columns:
        note = f"{note} Instance retrieval is of training images, without labels."
    return section(
        "Results",
        table(["", *map(measure_name, columns)], lines, css="values"),
        *_decisions(runs),
        _paper_table(runs),
        note=f"{note}{_standard_error(runs)}",
    )


def _decisions(runs: Sequence[Run]) -> list[Paragraph]:
    """Return what instance retrieval says of each run, but where it is among the verdicts already."""
    found = []
    for run in runs:
        text, is_verdict = (fn(run.result.get("retrieval")) for fn in (decision_text, mark_of))
        if text and not is_verdict:
            found.append(Paragraph(f"{run.label}: {text}." if len(runs) > 1 else f"{text.capitalize()}."))
    return found


def _data(run: Run) -> str:
    return str(run.setting("data", "test"))


def _value(
    value: float | None, frozen: float | None, best: float | None, *, signed: bool = True, share: bool = False
) -> Cell:
    """Return a measure with its difference to the frozen backbone's.

    Args:
        best: the largest on the same data. signed: whether more is better. share: in percent.
    """
    if value is None:
        return Cell(NONE, "n")
    beside: tuple[tuple[str, str], ...] = ()
    if frozen is not None:
        beside = ((_delta(value - frozen), _sign(value - frozen) if signed else ""),)
    text = percent(value) if share else _shown(value)
    return Cell(text, "n", is_bold=value == best, beside=beside)


def _shown(value: float) -> str:
    """Return three digits after the point; a number that they would show as 0 keeps those that count."""
    return compact(value) if value and abs(value) < 5e-4 else accuracy(value)


def _delta(difference: float) -> str:
    return f"{difference:+.3f}".replace("-", "−")  # noqa: RUF001 (a minus sign, as wide as the plus)


def _sign(difference: float) -> str:
    return "" if abs(difference) < 5e-4 else "up" if difference > 0 else "down"


def _standard_error(runs: Sequence[Run]) -> str:
    """Return a sentence on the standard error at an accuracy of one half, where it is largest."""
    counts = [number(event.get("test_samples")) for run in runs for event in run.events]
    smallest = min((n for n in counts if n and n > 0), default=None)
    if smallest is None:
        return ""
    return (
        f" With {count(smallest)} test images, one standard error of an accuracy is at most "
        f"{0.5 / math.sqrt(smallest):.3f}."
    )


def _paper_table(runs: Sequence[Run]) -> Part:
    lines: list[list[Text]] = []
    titles: dict[str, None] = {}
    for run in runs:
        for entry in paper.expected(run.config, run.views):
            here = run.views[entry.view][entry.measure]
            titles[entry.table] = None
            numbers = (accuracy(here), accuracy(entry.value), _delta(here - entry.value))
            lines.append([named(run, entry.view), measure_name(entry.measure), *map(numeric, numbers)])
    if not lines:
        return Paragraph("The paper has no number for this backbone, objective and data.")
    caption = f"Beside the paper's numbers, {'; '.join(titles)}. {paper.paper()['source']}"
    return table(["", "measure", "here", "paper", "difference"], lines, caption=caption)


def evaluations(runs: Sequence[Run]) -> PageSection | None:
    """Return what `selfmask eval` left in the runs' folders."""
    parts: list[Part | None] = []
    for run in runs:
        for found in run.evaluations:
            parts.append(_evaluation(run, found))
            if notes := [str(note) for note in found.get("notes") or () if note]:
                parts.append(Paragraph(" ".join(notes)))
            parts.extend(
                picture(run, f"{names.EVAL}/{name}")
                for name in found.get("plots") or ()
                if isinstance(name, str)
            )
    return section("Evaluations", *parts)


def _evaluation(run: Run, found: Mapping[str, Any]) -> CellTable:
    columns = in_order(name for name in found["columns"] if isinstance(name, str))
    rows = [
        row for row in found["rows"] if isinstance(row, Mapping) and isinstance(row.get("values"), Mapping)
    ]
    baseline: Mapping[str, Any] = next(
        (row["values"] for row in rows if row.get("name") == found.get("baseline")), {}
    )
    kind = str(found.get("kind"))
    lines: list[list[Text]] = []
    for row in rows:
        before = {} if row["values"] is baseline else baseline
        cells = []
        for name in columns:
            known = (number(row["values"].get(name)), number(before.get(name)))
            # without labels, more is neither better nor worse; masks are shares of weights
            cell = _value(*known, None, signed=kind != "labelfree", share=kind == "masks")
            spread = number(mapping(row.get("spread")).get(name))
            if spread is not None:
                cell = replace(cell, beside=(*cell.beside, (f"± {spread:.3f}", "")))
            cells.append(cell)
        lines.append([Cell(str(row.get("name"))), *cells])
    caption: list[Text] = [Cell(kind, is_bold=True), f" of {run.label}{_settings(found.get('settings'))}"]
    return table(["", *map(measure_name, columns)], lines, caption=caption, css="values")


def _settings(settings: Any) -> str:
    """Return what numbers depend on, in brackets: `(k 1, 5, 10; temperature 0.1)`."""
    known = [(key, value) for key, value in mapping(settings).items() if key not in _INTERNAL]
    if not known:
        return ""
    text = "; ".join(
        f"{key} {', '.join(map(str, value)) if isinstance(value, list) else value}" for key, value in known
    )
    return f" ({text if len(text) < 200 else text[:197] + '...'})"
