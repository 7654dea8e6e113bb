"""Does instance retrieval tell good masks from bad ones? Its decision against the accuracy, over many runs.

Every run adapts one backbone to one data set without labels (`objective.name=nbd`, or another objective) with
scores that may travel too little, enough or far too far, so that some masks help, some do nothing and some
destroy. The decision of each is made without labels; the truth is k-NN's paired difference to the frozen
backbone on pictures held out from training: *better* above two standard errors, *worse* below one. The test
parts are not read.

A row that is in the result file is not made again:

    python benchmarks/evidence/rule.py --json            84 runs: an hour on two quiet cores
    python benchmarks/evidence/rule.py --models resnet --sets rbc --out PART.json
"""

import itertools
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.evidence.labelfree import DEFAULT_DATA, METHODS, MODELS, SETS, WEIGHTS, Cell, Row, known_rows
from benchmarks.harness import RESULTS, Benchmark

NBD = METHODS["nbd"]
KEEP_BEST = ["train.keep=best", "eval.knn_every=1"]
RUNS: dict[str, list[str]] = {
    "reach 1.2": [*NBD, "optim.score_reach=1.2"],
    "reach 1.2, best state": [*NBD, "optim.score_reach=1.2", *KEEP_BEST],
    "reach 0.4": [*NBD, "optim.score_reach=0.4"],
    "reach 2": [*NBD, "optim.score_reach=2"],
    "reach 4": [*NBD, "optim.score_reach=4"],
    "reach 0.15": [*NBD, "optim.score_reach=0.15"],
    "reach 12": [*NBD, "optim.score_reach=12"],
}


def error_units(row: Row, measure: str = "knn") -> float:
    """The gain over the frozen backbone in its standard errors."""
    found = row[measure]
    return float(found["difference"] / max(found["error"], 1e-9))


def truth(row: Row) -> str:
    gain = error_units(row)
    return "better" if gain > 2 else "worse" if gain < -1 else "same"


def summarise(rows: dict[str, Row], bench: Benchmark) -> None:
    table = {
        decision: dict.fromkeys(("better", "same", "worse"), 0)
        for decision in ("adapted", "neutral", "frozen")
    }
    for row in rows.values():
        table[row["retrieval"]["decision"]][truth(row)] += 1
    bench.figure("runs", len(rows), min=60, quick=False)
    bench.figure("truth by decision", table)
    used = [error_units(row) for row in rows.values() if row["retrieval"]["decision"] == "adapted"]
    bench.figure("worst accepted run, in standard errors", min(used, default=0.0), min=-1.0, quick=False)
    kept = [error_units(row) for row in rows.values() if row["retrieval"]["decision"] != "frozen"]
    bench.figure("worst run that is not refused, in standard errors", min(kept, default=0.0))
    lost = [error_units(row) for row in rows.values() if row["retrieval"]["decision"] == "frozen"]
    bench.figure("best refused run, in standard errors", max(lost, default=0.0))
    for run in RUNS:
        of_run = {key: row for key, row in rows.items() if key.endswith(f"| {run}")}
        for model in MODELS:
            gains = [row["knn"]["difference"] for key, row in of_run.items() if key.split()[1] == model]
            if gains:
                bench.figure(f"mean k-NN gain, {model}, {run}", sum(gains) / len(gains))


def lines(rows: dict[str, Row]) -> str:
    found = [f"{'run':48} {'R frozen':>9} {'rise':>6} {'decision':>9} {'k-NN':>13} {'probe':>13}  truth"]
    for key, row in sorted(rows.items()):
        retrieval = row["retrieval"]
        numbers = [
            f"{100 * row[name]['difference']:+6.1f} +-{100 * row[name]['error']:4.1f}"
            for name in ("knn", "probe")
        ]
        found.append(
            f"{key:48} {retrieval['frozen']:9.3f} {100 * retrieval['difference']:+6.1f} "
            f"{retrieval['decision']:>9} {numbers[0]:>13} {numbers[1]:>13}  {truth(row)}"
        )
    return "\n".join(found)


def main() -> int:
    bench = Benchmark("rule", __doc__)
    add = bench.parser.add_argument
    add("--data", type=Path, default=os.environ.get("SELFMASK_SHARED_DATA", DEFAULT_DATA))
    add("--sets", nargs="+", choices=SETS, default=list(SETS))
    add("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    add("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    add("--pixels", type=int, default=48)
    add("--pictures", type=int, default=768, help="of the training part")
    add("--minutes", type=float, default=math.inf, help="start no run after so long")
    options = bench.parse()
    options.split, options.epochs, options.overrides = "val", 8.0, []
    if not (options.data / WEIGHTS["vit"]).is_file():
        bench.skip(f"no weights and images at {options.data}; give their folder with --data")
        return bench.finish()
    if options.quick:
        options.sets, options.models, options.runs, options.pixels = ["clothing"], ["vit"], ["reach 12"], 32
        options.epochs = 0.5
    torch.set_num_threads(1)
    known = Path(options.out or RESULTS / "rule.json")
    rows: dict[str, Row] = {} if options.quick else known_rows(known)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for dataset, model in itertools.product(options.sets, options.models):
            cell: Cell | None = None
            for run in options.runs:
                key = f"{dataset} {model} {options.pixels} px | {run}"
                if key in rows or time.perf_counter() - start > 60 * options.minutes:
                    continue
                cell = cell or Cell(options, dataset, model, options.pixels, Path(folder))
                rows[key] = cell.row(RUNS[run], 0)
                print(lines({key: rows[key]}).splitlines()[1], file=sys.stderr, flush=True)
                if not options.quick:  # a kill loses one row
                    known.with_suffix(".partial.json").write_text(json.dumps({"figures": {"rows": rows}}))
    print(lines(rows), file=sys.stderr)
    summarise(rows, bench)
    bench.figure("rows", rows)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
