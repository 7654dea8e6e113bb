"""Every method on one budget: families of masks, procedures, baselines and objectives, side by side.

`digits`: a small ViT trained on scanned digits 0-4 and frozen, adapted to digits 5-9 (scikit-learn ships the
pictures). With `--data`, an ImageNet ViT-tiny on photographs of groceries. Every row has the same backbone,
images, epochs and batches; its own learning rate stands in its row. One process and one thread a row;
`--jobs` rows at once. Times of rows are from the runs themselves, so they are of a machine as busy as
`--jobs` makes it; they are divided by full fine-tuning's of the same seed.

    python benchmarks/methods.py [--quick] [--data DIR] [--seeds 3] [--jobs 2] [--only NAME ...] --json
"""

import contextlib
import io
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import traceback
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.cascade_real import WEIGHTS, digits_settings
from benchmarks.harness import Benchmark
from benchmarks.method_rows import ROWS
from benchmarks.method_rows.row import Row, Setting

TABLE = Path(__file__).resolve().parents[1] / "docs" / "methods_table.md"
YARDSTICK = "finetune_sgd"
_BATCH = 64
_COMMON = (
    "train.global_batch_size=64",
    "optim.warmup_epochs=1",
    "eval.knn_k=[20]",
    "eval.knn_every=0",
    "eval.frozen_baseline=false",
    "engine.device=cpu",
    "engine.workers=0",
    "engine.threads=1",
    "run.log_every=10",
    "run.progress=false",
    "run.overwrite=true",
)
_DIGITS = ("data.crop_scale=[0.7, 1.0]", "data.flip=false")
_COLUMNS = ("knn20", "probe", "head", "active", "stored_bytes", "step_ratio")


def photo_settings(data: Path) -> list[str]:
    """ViT-tiny on groceries at 64 pixels."""
    return [
        "backbone.name=timm:vit_tiny_patch16_224",
        f"backbone.weights={data / WEIGHTS['vit']}",
        "backbone.image_size=64",
        "backbone.crop_pct=1.0",
        "backbone.mean=[0.5, 0.5, 0.5]",
        "backbone.std=[0.5, 0.5, 0.5]",
        f"data.train={data / 'grocery' / 'train.tar'}",
        f"data.test={data / 'grocery' / 'test.tar'}",
        "data.crop_scale=[0.4, 1.0]",
    ]


def measure(row: str, setting: Setting) -> dict[str, Any]:
    """One row with one seed; what an earlier run left of it in the setting's folder is taken as it is."""
    done = setting.folder / "outcomes" / f"{row}-{setting.seed}.json"
    if done.exists():
        return json.loads(done.read_text())
    torch.set_num_threads(1)
    chosen = next(r for r in ROWS if r.name == row)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        outcome = asdict(chosen.measure(setting))
    done.parent.mkdir(parents=True, exist_ok=True)
    done.write_text(json.dumps(outcome, default=str))
    return outcome


def measure_all(rows: Sequence[Row], settings: Sequence[Setting], jobs: int) -> dict[str, list[Any]]:
    """{row: what came out of each seed}; a failure is kept as its text and stops nothing."""
    found: dict[str, list[Any]] = {row.name: [None] * len(settings) for row in rows}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        work = {
            pool.submit(measure, row.name, setting): (row.name, index)
            for index, setting in enumerate(settings)
            for row in rows
        }
        for done, future in enumerate(as_completed(work), 1):
            name, index = work[future]
            try:
                found[name][index] = future.result()
            except Exception as error:
                traceback.print_exception(error)
                found[name][index] = f"{type(error).__name__}: {error}"
            print(f"{done}/{len(work)}  {name}, seed {index}", file=sys.stderr, flush=True)
    return found


def summarise(found: dict[str, list[Any]]) -> dict[str, dict[str, Any]]:
    """Mean and spread over seeds of every column, for each row."""
    yardstick = [_get(one, "step_seconds") for one in found.get(YARDSTICK, [])]
    summary: dict[str, dict[str, Any]] = {}
    for name, outcomes in found.items():
        errors = [one for one in outcomes if isinstance(one, str)]
        columns: dict[str, Any] = {"errors": errors} if errors else {}
        for key in _COLUMNS[:-1]:
            columns[key] = _spread(_get(one, key) for one in outcomes)
        ratios = [
            mine / full
            for one, full in zip(outcomes, yardstick, strict=False)
            if (mine := _get(one, "step_seconds")) and full
        ]
        columns["step_ratio"] = _spread(ratios)
        columns["more"] = [one["more"] for one in outcomes if isinstance(one, dict) and one["more"]]
        summary[name] = columns
    return summary


def _get(outcome: Any, key: str) -> Any:
    return outcome.get(key) if isinstance(outcome, dict) else None


def _spread(values: Iterable[Any]) -> dict[str, float] | None:
    numbers = [value for value in values if value is not None]
    if not numbers:
        return None
    return {
        "mean": statistics.fmean(numbers),
        "median": statistics.median(numbers),
        "sd": statistics.pstdev(numbers),
        "seeds": len(numbers),
    }


def write_table(path: Path, sections: dict[str, dict[str, dict[str, Any]]], heads: dict[str, str]) -> None:
    """`docs/methods_table.md`: a table for each data set, as it came out."""
    lines = ["# Every method on one budget", "", heads["about"], ""]
    groups = {row.name: (row.group, row.source) for row in ROWS}
    for title, summary in sections.items():
        lines += [f"## {title}", "", heads[title], ""]
        lines += [
            "| method | group | k-NN | probe | own head | active | bytes stored | step / fine-tuning |",
            "|---|---|---:|---:|---:|---:|---:|---:|",
        ]
        for name, columns in summary.items():
            cells = [_cell(columns[key], key) for key in _COLUMNS]
            failed = f" (failed {len(columns['errors'])} times)" if "errors" in columns else ""
            lines.append(f"| {name}{failed} | {groups[name][0]} | {' | '.join(cells)} |")
        lines.append("")
        notes = [f"- {name}: {text}" for name, c in summary.items() if (text := _note(c["more"]))]
        if notes:
            lines += ["Further numbers of single rows, first seed:", "", *notes, ""]
    path.write_text("\n".join(lines))


def _cell(spread: dict[str, float] | None, key: str) -> str:
    if spread is None:
        return "-"
    if key == "stored_bytes":
        return f"{spread['mean']:,.0f}"
    if key == "step_ratio":
        return f"{spread['median']:.2f}"
    return f"{spread['mean']:.3f} ± {spread['sd']:.3f}"


def _note(more: Sequence[dict[str, Any]]) -> str:
    """Numbers and remarks in a line; what has a form of its own stands in the result file."""
    if not more:
        return ""
    return "; ".join(text for key, value in more[0].items() if (text := _short(key, value)))


def _short(key: str, value: Any) -> str:
    if isinstance(value, dict):
        inner = ", ".join(_short(str(name), part) for name, part in value.items())
        return f"{key}: {inner}"
    if isinstance(value, list):
        return f"{key}: {', '.join(f'{part:.3g}' for part in value)}" if _are_numbers(value) else ""
    if isinstance(value, float):
        return f"{key} {value:.3g}"
    return f"{key} {value}" if "\n" not in str(value) else ""


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float) for value in values)


def main() -> int:
    bench = Benchmark("methods", __doc__)
    bench.parser.add_argument("--data", type=Path, help="folder with weights and photographs")
    bench.parser.add_argument("--seeds", type=int, default=3)
    bench.parser.add_argument("--jobs", type=int, default=2, help="rows at once, a thread each")
    bench.parser.add_argument("--epochs", type=float, default=40, help="of the digits")
    bench.parser.add_argument("--photo-epochs", type=float, default=2)
    bench.parser.add_argument(
        "--work", type=Path, help="folder that keeps runs and outcomes; a second start goes on there"
    )
    bench.parser.add_argument("--only", nargs="+", metavar="NAME", help="these rows alone")
    bench.parser.add_argument("--table", type=Path, help=f"where the table goes (full run: {TABLE.name})")
    options = bench.parse()
    names = options.only or [row.name for row in ROWS]
    if unknown := sorted(set(names) - {row.name for row in ROWS}):
        bench.parser.error(f"no row {unknown[0]!r}; there are {', '.join(row.name for row in ROWS)}")
    rows = [row for row in ROWS if row.name in names]
    seeds, epochs = (1, 1.0) if options.quick else (options.seeds, options.epochs)
    sections, heads = {}, {"about": _ABOUT.format(jobs=options.jobs)}
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with contextlib.ExitStack() as stack:
        folder = options.work or stack.enter_context(tempfile.TemporaryDirectory())
        base = {"Digits": [*digits_backbone(Path(folder)), *_DIGITS, f"train.epochs={epochs}"]}
        heads["Digits"] = (
            f"A ViT of 0.2 M weights trained on digits 0-4, adapted to 5-9: 16 px, {epochs:g} epochs."
        )
        if options.data is not None:
            base["Groceries"] = [*photo_settings(options.data), f"train.epochs={options.photo_epochs}"]
            heads["Groceries"] = f"ViT-tiny, ImageNet weights, 64 px, {options.photo_epochs:g} epochs."
        for title, overrides in base.items():
            settings = [
                Setting((*overrides, *_COMMON), Path(folder) / title, seed, _BATCH) for seed in range(seeds)
            ]
            found = measure_all(rows, settings, options.jobs)
            sections[title] = summarise(found)
            bench.figure(title, sections[title])
            failed = [name for name, columns in sections[title].items() if "errors" in columns]
            bench.figure(f"{title}: rows that failed", len(failed), max=0)
        if options.table or not (options.quick or options.only):
            write_table(options.table or TABLE, sections, heads)
    return bench.finish()


def digits_backbone(folder: Path) -> list[str]:
    """The backbone and data of the digits, without the cascade's own settings."""
    keys = ("backbone.", "data.train=", "data.test=")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return [setting for setting in digits_settings(folder) if setting.startswith(keys)]


_ABOUT = """Written by `python benchmarks/methods.py`, as it came out; hardware and versions stand in
`benchmarks/results/methods.json`. Mean and standard deviation over seeds. Active: share of the backbone's
weights that are not zero. Bytes stored: what a task keeps beside the shared backbone, without the head. Steps
are of one CPU thread with {jobs} rows at once, on a machine that had other work too: their ratios, medians
over seeds, are rough. Budgets this small rank methods by how fast they learn: the table compares costs and
shows that each works; it says nothing of their best. CLIP and SLIP have no row: they learn from captions,
which this data does not have. SwAV and the cascade are measured by `benchmarks/cascade_real.py`."""


if __name__ == "__main__":
    sys.exit(main())
