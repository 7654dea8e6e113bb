"""The page: what the sections give, under one head, in one file."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

from selfmask_dist.cli.report import curve_sections, mask_sections, result_sections, run_sections
from selfmask_dist.cli.report.markup import Html, join, tag
from selfmask_dist.cli.report.parts import state_badge
from selfmask_dist.cli.report.reading import Run, read_runs

# a browser then refuses scripts and whatever is not in the file
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def write_report(runs: Sequence[Path], path: Path) -> list[str]:
    """Write the page about runs; returns what could not be read of them.

    Raises:
        ValueError: a folder is not a run's.
    """
    found = read_runs(runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    # file names may hold bytes that are no text
    partial.write_bytes(build_page(found).encode("utf-8", "replace"))
    partial.replace(path)
    return [problem for run in found for problem in run.every_problem()]


def build_page(runs: Sequence[Run]) -> str:
    """The whole document."""
    parts = [
        run_sections.runs_table(runs),
        result_sections.results(runs),
        result_sections.evaluations(runs),
        curve_sections.curves(runs),
        mask_sections.sparsity(runs),
        mask_sections.similarity(runs),
        run_sections.clusters(runs),
        run_sections.telemetry(runs),
        run_sections.sizes(runs),
        run_sections.settings(runs),
    ]
    title = ", ".join(run.label for run in runs)
    style = (Path(__file__).parent / "style.css").read_text()
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{title} - selfmask report"),
        tag("style", Html(style)),
    )
    body = tag(
        "body",
        _header(runs),
        tag(
            "main",
            run_sections.complaints(runs),
            result_sections.tiles(runs[0]) if len(runs) == 1 else None,
            parts,
        ),
        tag("footer", f"selfmask report of {', '.join(str(run.path) for run in runs)}"),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _header(runs: Sequence[Run]) -> Html:
    if len(runs) == 1:
        run = runs[0]
        title = join(run.label, " ", state_badge(run))
    else:
        title = join(f"{len(runs)} runs")
    written = time.strftime("%Y-%m-%d %H:%M", time.localtime())
    return tag("header", tag("h1", title), tag("p", f"Self-Masking Networks, report of {written}"))
