"""What could make `objective.name=nbd` better: one change at a time, on pictures held out from training.

Every variant adapts ViT-tiny to each data set with everything else as it is by default, and is measured by
k-NN against the frozen backbone and against the default of the same run, paired over the pictures. The test
parts are not read.

A row that is in the result file is not made again:

    python benchmarks/evidence/beyond.py --json              20 variants on four sets: an hour on one core
    python benchmarks/evidence/beyond.py --variants default "two views" --sets rbc --out PART.json
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

VARIANTS: dict[str, list[str]] = {
    "default": [],
    "two views": ["nbd.views=2"],
    "crops from .2 of the area": ["nbd.crop_scale=[0.2, 1.0]"],
    "crops from .6 of the area": ["nbd.crop_scale=[0.6, 1.0]"],
    "colours as they are": ["nbd.jitter=0"],
    "no neighbours": ["nbd.neighbours=0"],
    "15 neighbours": ["nbd.neighbours=15"],
    "own share .8": ["nbd.own_share=0.8"],
    "own share .25": ["nbd.own_share=0.25"],
    "neighbours anew every epoch": ["nbd.renew_every=1"],
    "neighbours anew every other epoch": ["nbd.renew_every=2"],
    "temperature .05": ["nbd.temperature=0.05"],
    "temperature .2": ["nbd.temperature=0.2"],
    "bank keeps .9": ["nbd.bank_momentum=0.9"],
    "no warm-up of the head": ["nbd.warmup_steps=0"],
    "first half of the layers": ["mask.first_layers=24"],
    "matrices of MLPs alone": ['mask.exclude=["*attn*"]'],
    "matrices of attention alone": ['mask.exclude=["*mlp*"]'],
    "batches of 64": ["train.global_batch_size=64"],
    "16 epochs": ["train.epochs=16", "optim.warmup_epochs=1.6"],
}
CHOICES = tuple(VARIANTS)


def lines(rows: dict[str, Row]) -> str:
    found = [f"{'cell and variant':64} {'R':>13} {'k-NN':>13} {'probe':>13} {'KB':>6} {'min':>5}"]
    for key, row in rows.items():
        numbers = [
            f"{100 * row[name]['difference']:+6.1f} +-{100 * row[name]['error']:4.1f}"
            for name in ("knn", "probe")
        ]
        rise = f"{100 * row['retrieval']['difference']:+.0f} {row['retrieval']['decision']}"
        found.append(
            f"{key:64} {rise:>13} {numbers[0]:>13} {numbers[1]:>13} {row['bytes'] / 1024:6.1f} "
            f"{row['minutes']:5.1f}"
        )
    return "\n".join(found)


def summarise(rows: dict[str, Row], bench: Benchmark) -> None:
    """Mean gains over the sets that every variant has, and the mean difference to the default's."""
    by_variant: dict[str, dict[str, Row]] = {}
    for key, row in rows.items():
        cell, _, variant = key.partition(" | ")
        by_variant.setdefault(variant, {})[cell] = row
    default = by_variant.get("default", {})
    for variant, found in by_variant.items():
        shared = sorted(set(found) & set(default))
        if not shared:
            continue
        for measure in ("knn", "probe"):
            gains = [found[cell][measure]["difference"] for cell in shared]
            bench.figure(f"{variant}, {measure}: mean gain", sum(gains) / len(gains))
            beside = [
                found[cell][measure]["difference"] - default[cell][measure]["difference"] for cell in shared
            ]
            bench.figure(f"{variant}, {measure}: over the default", sum(beside) / len(beside))
        better = sum(found[cell]["knn"]["difference"] > default[cell]["knn"]["difference"] for cell in shared)
        bench.figure(f"{variant}: sets above the default by k-NN", f"{better} of {len(shared)}")


def main() -> int:
    bench = Benchmark("beyond", __doc__)
    add = bench.parser.add_argument
    add("--data", type=Path, default=os.environ.get("SELFMASK_SHARED_DATA", DEFAULT_DATA))
    add("--sets", nargs="+", choices=SETS, default=list(SETS))
    add("--models", nargs="+", choices=list(MODELS), default=["vit"])
    add("--variants", nargs="+", choices=CHOICES, default=list(CHOICES))
    add("--pixels", type=int, default=48)
    add("--pictures", type=int, default=768, help="of the training part")
    add("--minutes", type=float, default=math.inf, help="start no run after so long")
    options = bench.parse()
    options.split, options.epochs, options.overrides = "val", 8.0, []
    if not (options.data / WEIGHTS["vit"]).is_file():
        bench.skip(f"no weights and images at {options.data}; give their folder with --data")
        return bench.finish()
    if options.quick:
        options.sets, options.variants, options.pixels = ["clothing"], ["default", "no neighbours"], 32
        options.epochs = 0.5
    torch.set_num_threads(1)
    known = Path(options.out or RESULTS / "beyond.json")
    rows: dict[str, Row] = {} if options.quick else known_rows(known)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for dataset, model in itertools.product(options.sets, options.models):
            cell: Cell | None = None
            for variant in options.variants:
                key = f"{dataset} {model} {options.pixels} px | {variant}"
                if key in rows or time.perf_counter() - start > 60 * options.minutes:
                    continue
                cell = cell or Cell(options, dataset, model, options.pixels, Path(folder))
                rows[key] = cell.row([*METHODS["nbd"], *VARIANTS[variant]], 0)
                print(lines({key: rows[key]}).splitlines()[1], file=sys.stderr, flush=True)
                if not options.quick:  # a kill loses one row
                    known.with_suffix(".partial.json").write_text(json.dumps({"figures": {"rows": rows}}))
    print(lines(rows), file=sys.stderr)
    summarise(rows, bench)
    bench.figure("rows", rows)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
