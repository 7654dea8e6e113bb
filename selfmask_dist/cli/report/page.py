"""The page: what the sections give, under one head, in one file."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from selfmask_dist.cli.report import curve_sections, mask_sections, parts, result_sections, run_sections
from selfmask_dist.cli.report.reading import Run, read_runs
from selfmask_dist.common.files import write_bytes
from selfmask_dist.common.optional import require


@dataclass(frozen=True)
class _Failure:
    """A run that failed, and why."""

    label: str
    error: str


def write_report(runs: Sequence[Path], path: Path) -> list[str]:
    """Write the page about runs; returns what could not be read of them.

    Raises:
        ValueError: a folder is not a run's, or a library that draws the page is not installed.
    """
    found = read_runs(runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    # file names may hold bytes that are no text
    write_bytes(path, build_page(found).encode("utf-8", "replace"))
    return [problem for run in found for problem in run.every_problem()]


def build_page(runs: Sequence[Run]) -> str:
    """Return the whole document; the same runs give the same one, but for the time that it states."""
    jinja2 = require("jinja2", "jinja2", extra="report", needed_by="selfmask report")
    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sections = [
        run_sections.runs_table(runs),
        run_sections.verdicts(runs),
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
    page: str = environment.get_template("page.html").render(
        style=(folder / "style.css").read_text(),
        colours=parts.COLOURS,
        written=time.strftime("%Y-%m-%d %H:%M", time.localtime()),
        runs=[{"label": run.label, "path": str(run.path)} for run in runs],
        badge=parts.state_badge(runs[0]) if len(runs) == 1 else None,
        failures=[_Failure(run.label, run.error) for run in runs if run.error],
        problems=[problem for run in runs for problem in run.every_problem()],
        tiles=result_sections.tiles(runs[0]) if len(runs) == 1 else [],
        sections=[one for one in sections if one is not None],
    )
    return page
