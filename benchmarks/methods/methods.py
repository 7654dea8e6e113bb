"""Every method on one budget: families of masks, procedures, baselines and objectives, side by side.

`digits`: a small ViT trained on scanned digits 0-4 and frozen, adapted to digits 5-9 (scikit-learn ships the
pictures). With `--data`, an ImageNet ViT-tiny on photographs of groceries. Every row has the same backbone,
images, epochs and batches, and learning rates that `--tune` chose for it on held-out training images, with
equally many tries for every row (`method_rows/rates.py`). One process and one thread a row; `--jobs` rows at
once.

    python benchmarks/methods.py [--quick] [--data DIR] [--seeds 3] [--jobs 2] [--only NAME ...] --json
    python benchmarks/methods.py --tune digits [--only NAME ...]
    python benchmarks/methods.py --steps digits --work DIR       # a round of step times, for a later table

Step times need a machine without other work: `--steps` runs a few steps of every row, full fine-tuning's
again and again between them, and adds a round to those in DIR. Without rounds the table has no step times.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Benchmark
from benchmarks.methods import ROWS, rates, settings
from benchmarks.methods.row import Row, Setting
from benchmarks.methods.table import YARDSTICK, summarise, write_table

TABLE = Path(__file__).resolve().parents[2] / "docs" / "methods_table.md"
_TITLES = {"digits": "Digits", "groceries": "Groceries"}
_BRIEF = (
    *("train.max_steps=15", "run.log_every=5", "optim.warmup_epochs=0"),
    *("eval.final=false", "eval.frozen_baseline=false"),
)
_ROWS_BETWEEN = 6
_JOBS_BETWEEN_SAVES = 10 * len(rates.FACTORS)


@dataclass(frozen=True)
class Job:
    """One row with one seed, or one try of its tuning; `key` tells it from the row's others."""

    row: str
    key: str
    setting: Setting


def measure(job: Job) -> dict[str, Any]:
    """What one job gave; what an earlier start left of it, with the same rates, is taken as it is."""
    setting = job.setting
    done = setting.folder / "outcomes" / f"{job.row}-{job.key}.json"
    if done.exists():
        known: dict[str, Any] = json.loads(done.read_text())
        if known.get("rates") == list(setting.rates):
            return known
    torch.set_num_threads(1)
    chosen = next(row for row in ROWS if row.name == job.row)
    work = setting.folder / "runs" / f"{job.row}-{job.key}"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        outcome = asdict(chosen.measure(replace(setting, folder=work)))
    outcome["rates"] = list(setting.rates)
    done.parent.mkdir(parents=True, exist_ok=True)
    done.write_text(json.dumps(outcome, default=str))
    shutil.rmtree(work, ignore_errors=True)  # its checkpoints are large
    return outcome


def measure_all(jobs: Sequence[Job], processes: int) -> dict[str, dict[str, Any]]:
    """{row: {key: what came out}}; a failure is kept as its text and stops nothing."""
    found: dict[str, dict[str, Any]] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        work = {pool.submit(measure, job): job for job in jobs}
        for job in jobs:  # in the order of the table
            found.setdefault(job.row, {})[job.key] = None
        for done, future in enumerate(as_completed(work), 1):
            job = work[future]
            try:
                found[job.row][job.key] = future.result()
            except Exception as error:
                traceback.print_exception(error)
                found[job.row][job.key] = f"{type(error).__name__}: {error}"
            print(f"{done}/{len(work)}  {job.row}, {job.key}", file=sys.stderr, flush=True)
    return found


def base_setting(name: str, options: argparse.Namespace, work: Path, *, held_out: bool = False) -> Setting:
    """A setting without a seed of its own, made ready in its folder."""
    folder = work / _TITLES[name]
    if name == "digits":
        own, captioned = settings.digits(folder, options.epochs, held_out=held_out)
    else:
        own, captioned = settings.groceries(
            folder, options.data, options.photo_epochs, options.photo_size, held_out=held_out
        )
    folder = folder / "held-out" if held_out else folder
    return Setting((*own, *settings.COMMON), folder, 0, settings.BATCH, name, captioned)


def tune(name: str, rows: Sequence[Row], options: argparse.Namespace, work: Path) -> None:
    """Try every row's rates on held-out training images, and write the best into `rates.json`."""
    setting = base_setting(name, options, work, held_out=True)
    jobs = []
    for row in rows:
        # procedures measure by themselves; nothing else looks at the probe here, which takes a while
        probe = () if row.group == "procedures" else ("eval.probe=false",)
        own = replace(setting, overrides=(*setting.overrides, *probe))
        tries = rates.tries(row.name)
        jobs += [Job(row.name, f"{f:g}", replace(own, rates=tried)) for f, tried in tries.items()]
    for start in range(0, len(jobs), _JOBS_BETWEEN_SAVES):
        part = jobs[start : start + _JOBS_BETWEEN_SAVES]
        for row_name, outcomes in measure_all(part, options.jobs).items():
            judged = {float(key): rates.score(one) for key, one in outcomes.items() if isinstance(one, dict)}
            if judged:  # a try that diverged has none
                rates.save(name, row_name, judged)


def time_steps(name: str, rows: Sequence[Row], options: argparse.Namespace, work: Path) -> None:
    """One round: each row's step over full fine-tuning's, which is timed again before every few rows."""
    setting = base_setting(name, options, work)
    torch.set_num_threads(1)
    yardstick, ratios = 0.0, {}
    for index, row in enumerate(row for row in rows if row.group != "procedures"):
        if index % _ROWS_BETWEEN == 0:
            yardstick = _step_seconds(YARDSTICK, setting) or 0.0
        if seconds := _step_seconds(row.name, setting):
            ratios[row.name] = seconds / yardstick
    with (setting.folder / "steps.jsonl").open("a") as file:
        file.write(json.dumps(ratios) + "\n")


def _step_seconds(row: str, setting: Setting) -> float | None:
    rated = replace(setting, rates=rates.chosen(setting.name, row), brief=_BRIEF)
    with tempfile.TemporaryDirectory() as folder:
        found: float | None = measure(Job(row, "steps", replace(rated, folder=Path(folder))))["step_seconds"]
        return found


def step_rounds(folder: Path) -> dict[str, list[float]]:
    """{row: its ratio in each round that `--steps` left}."""
    path = folder / "steps.jsonl"
    found: dict[str, list[float]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        for row, ratio in json.loads(line).items():
            found.setdefault(row, []).append(ratio)
    return found


def compare(name: str, rows: Sequence[Row], options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The rows' numbers in one setting, over seeds."""
    setting = base_setting(name, options, work)
    chosen = {row.name: rates.chosen(name, row.name) for row in rows}
    jobs = [
        Job(row.name, str(seed), replace(setting, seed=seed, rates=chosen[row.name]))
        for seed in range(options.seeds if name == "digits" else options.photo_seeds)
        for row in rows
    ]
    outcomes = {row: list(found.values()) for row, found in measure_all(jobs, options.jobs).items()}
    summary = summarise(outcomes, step_rounds(setting.folder))
    for row_name, columns in summary.items():
        columns["rates"] = chosen[row_name]
    return summary


def main() -> int:
    bench = Benchmark("methods", __doc__)
    bench.parser.add_argument("--data", type=Path, help="folder with weights and photographs")
    bench.parser.add_argument("--seeds", type=int, default=3)
    bench.parser.add_argument("--jobs", type=int, default=2, help="rows at once, a thread each")
    bench.parser.add_argument("--epochs", type=float, default=10, help="of the digits")
    bench.parser.add_argument("--photo-epochs", type=float, default=2)
    bench.parser.add_argument("--photo-seeds", type=int, default=1)
    bench.parser.add_argument("--photo-size", type=int, default=64, help="pixels of the photographs")
    bench.parser.add_argument("--tune", choices=tuple(_TITLES), help="choose learning rates and do no more")
    bench.parser.add_argument("--steps", choices=tuple(_TITLES), help="add a round of step times to --work")
    bench.parser.add_argument(
        "--work", type=Path, help="folder that keeps outcomes; a second start goes on there"
    )
    bench.parser.add_argument("--only", nargs="+", metavar="NAME", help="these rows alone")
    bench.parser.add_argument("--table", type=Path, help=f"where the table goes (full run: {TABLE.name})")
    options = bench.parse()
    names = options.only or [row.name for row in ROWS]
    if unknown := sorted(set(names) - {row.name for row in ROWS}):
        bench.parser.error(f"no row {unknown[0]!r}; there are {', '.join(row.name for row in ROWS)}")
    if "groceries" in (options.tune, options.steps) and options.data is None:
        bench.parser.error("groceries need --data")
    if options.steps and options.work is None:
        bench.parser.error("--steps needs --work, where its rounds are kept")
    rows = [row for row in ROWS if row.name in names]
    if options.quick:
        options.seeds, options.epochs = 1, 1.0
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with contextlib.ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if options.tune:
            tune(options.tune, rows, options, work)
            return 0
        if options.steps:
            time_steps(options.steps, rows, options, work)
            return 0
        sections, heads = {}, {"about": _ABOUT.format(tries=len(rates.FACTORS))}
        for name in ("digits",) if options.data is None else ("digits", "groceries"):
            title = _TITLES[name]
            heads[title] = _HEADS[name].format(**vars(options))
            sections[title] = compare(name, rows, options, work)
            bench.figure(title, sections[title])
            failed = [row for row, columns in sections[title].items() if "errors" in columns]
            bench.figure(f"{title}: rows that failed", len(failed), max=0)
    if options.table or not (options.quick or options.only):
        write_table(options.table or TABLE, ROWS, sections, heads)
    return bench.finish()


_HEADS = {
    "digits": "A ViT of 0.2 M weights trained on digits 0-4, adapted to 5-9: 16 px, {epochs:g} epochs, "
    "{seeds} seed(s). CLIP and SLIP: a CLIP model of about that size, trained on digits 0-4 with captions; "
    "its text tower stays frozen.",
    "groceries": "ViT-tiny, ImageNet weights, {photo_size} px, {photo_epochs:g} epochs, {photo_seeds} "
    "seed(s). CLIP and SLIP: the same ViT-tiny beside a text tower that is trained from random weights. Rows "
    "that `rates.json` has no rates of photographs for are not tuned: they have the middle of their line, "
    "scores' rates times 0.1 and weights' times 0.2.",
}
_ABOUT = """Written by `python benchmarks/methods.py`, as it came out; hardware and versions stand in
`benchmarks/results/methods.json`. Mean and standard deviation over seeds. Active: share of the backbone's
weights that are not zero. Bytes stored: what a task keeps beside the shared backbone, without the head. Steps
are of one CPU thread, medians of ratios to full fine-tuning's of the same round (`--steps`). Rates: each
row's learning rates, the best of {tries} along one line on held-out training images
(`benchmarks/methods/rates.json`), by the mean of k-NN and own head. Budgets this small rank methods by
how fast they learn: the table compares costs and says nothing of the methods' best. The cascade is measured
by `benchmarks/cascade/real.py`."""


if __name__ == "__main__":
    sys.exit(main())
