"""Supervised masks with and without the training habits of the field, on real photographs.

Every habit trains a mask and a linear head on the same few pictures, for the same steps, from the same seed,
and is held against training without any: accuracy of the head on the test part, with the standard error of
the difference between runs on the same pictures (binomial, of both, as an upper bound). A habit's strength is
chosen once for all, never on a test part: the one with the highest accuracy on a held-out fifth of the first
set's training part, seed 0, ViT-tiny.

    python benchmarks/evidence/habits.py --json            what is missing of the grid: half a minute a run
    python benchmarks/evidence/habits.py --quick

A run that is in the result file already is not made again, so the grid can be made in pieces.
"""

import itertools
import json
import math
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.evidence.labelfree import DEFAULT_DATA, MODELS, WEIGHTS, held_out
from benchmarks.harness import RESULTS, Benchmark
from selfmask_dist.cli.train import run
from selfmask_dist.config import load_config
from selfmask_dist.training.build import open_data

SETS = ("rbc", "grocery")
ALL = [
    "backbone.crop_pct=1.0",
    "backbone.batchnorm=frozen",
    "train.global_batch_size=32",
    "optim.score_step=rms",
    "optim.score_reach=auto",
    "optim.warmup_epochs=0.5",
    "data.crop_scale=[0.35, 1.0]",
    "eval.knn_every=0",
    "eval.probe=false",
    "eval.frozen_baseline=false",
    "eval.knn_k=[20]",
    "engine.workers=0",
    "engine.threads=1",
    "run.progress=false",
    "run.log_every=50",
    "checkpoint.every_minutes=0",
]
NONE = "none"
TEST_PICTURES = 600  # that are measured at most
HABITS: dict[str, dict[str, list[str]]] = {
    NONE: {"": []},
    "label smoothing": {"0.1": ["objective.label_smoothing=0.1"]},
    "mixup": {"0.2": ["augment.mixup=0.2"], "0.8": ["augment.mixup=0.8"]},
    "CutMix": {
        "1": ["augment.cutmix=1.0"],
        "1, half of the images": ["augment.cutmix=1.0", "augment.mix_probability=0.5"],
    },
    "RandAugment": {
        "2 x level 5": ["augment.randaugment=2", "augment.randaugment_magnitude=5"],
        "2 x level 9": ["augment.randaugment=2"],
    },
    "random erasing": {"0.25": ["augment.erase=0.25"]},
    "EMA": {"0.9": ["train.ema=0.9"], "0.98": ["train.ema=0.98"]},
    "layer decay": {"0.75": ["optim.layer_decay=0.75"], "0.9": ["optim.layer_decay=0.9"]},
    "best of a tenth held out": {
        "accuracy": ["train.keep=best", "train.validation=0.1", "eval.knn_every=1"],
    },
}
Row = dict[str, Any]


def accuracy_of(options: Any, split: str, dataset: str, model: str, settings: list[str], seed: int) -> Row:
    """Train one mask and measure it on a split; returns its accuracies and how long it took."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        where = SimpleNamespace(data=options.data, split=split, pictures=options.pictures)
        settings = [
            *MODELS[model],
            f"backbone.weights={options.data / WEIGHTS[model]}",
            f"backbone.image_size={options.pixels}",
            *_parts(where, dataset, Path(name)),
            *ALL,
            f"train.epochs={options.epochs}",
            *settings,
        ]
        config = load_config(None, [*settings, f"run.dir={name}", "run.name=a", f"seed={seed}"])
        result = run(config)
        pictures = len(open_data(config)[1])  # of the split that is measured
        shutil.rmtree(Path(name) / "a")
    found = {
        "head": result["adapted"]["head"],
        "knn20": result["adapted"]["knn20"],
        "active": result["mask"]["active"],
        "pictures": pictures,
        "seconds": round(time.perf_counter() - start, 1),
    }
    return found | ({"kept_step": result["kept_step"]} if "kept_step" in result else {})


def _parts(where: Any, dataset: str, folder: Path) -> list[str]:
    """Return the parts to train and to measure on; of the latter at most 600 pictures, at equal distances."""
    settings = held_out(where, dataset, folder)
    if any(setting.startswith("data.test_subset") for setting in settings):
        return settings
    number = len(open_data(load_config(None, settings))[1])
    ids = np.arange(min(TEST_PICTURES, number)) * number // min(TEST_PICTURES, number)
    np.save(folder / "test.npy", ids)
    return [*settings, f"data.test_subset={folder / 'test.npy'}"]


class Grid:
    """All runs so far, kept in a file beside the result."""

    def __init__(self, options: Any, known: Path) -> None:
        self.options = options
        self.partial = known.with_suffix(".partial.json")
        self.rows: dict[str, Row] = {}
        for path in (known, self.partial):
            if path.exists() and not options.quick:
                self.rows |= json.loads(path.read_text())["figures"]["rows"]
        self.start = time.perf_counter()

    def row(self, split: str, dataset: str, model: str, habit: str, strength: str, seed: int) -> Row | None:
        """Return a run's row, made where it is not there yet; None where there is no time left for it."""
        key = f"{split} | {dataset} {model} | {habit} {strength}".rstrip() + f", seed {seed}"
        if key not in self.rows:
            if time.perf_counter() - self.start > 60 * self.options.minutes:
                return None
            settings = HABITS[habit][strength]
            self.rows[key] = accuracy_of(self.options, split, dataset, model, settings, seed)
            print(f"{key}: {self.rows[key]}", file=sys.stderr, flush=True)
            if not self.options.quick:
                self.partial.write_text(json.dumps({"figures": {"rows": self.rows}}))
        return self.rows[key]


def choose(grid: Grid) -> dict[str, str]:
    """Return each habit's strength: the best on the first set's held-out part."""
    chosen = {}
    for habit, strengths in HABITS.items():
        means: dict[str, float] = {}
        for strength in strengths if len(strengths) > 1 else ():
            row = grid.row("val", grid.options.sets[0], "vit", habit, strength, 0)
            means |= {strength: row["head"]} if row is not None else {}
        chosen[habit] = max(means, key=means.__getitem__) if means else next(iter(strengths))
    return chosen


def compare(grid: Grid, chosen: dict[str, str]) -> dict[str, dict[str, Row]]:
    """Return each habit's mean accuracy and difference to none, by set and backbone."""
    options, found = grid.options, dict[str, dict[str, Row]]()
    for seed, model, dataset, habit in itertools.product(options.seeds, options.models, options.sets, HABITS):
        grid.row("test", dataset, model, habit, chosen[habit], seed)
    for model, dataset, habit in itertools.product(options.models, options.sets, HABITS):
        pairs = [
            (grid.row("test", dataset, model, habit, chosen[habit], seed), plain)
            for seed in options.seeds
            if (plain := grid.row("test", dataset, model, NONE, "", seed)) is not None
        ]
        both = [(own, plain) for own, plain in pairs if own is not None]
        if not both:
            continue
        head = sum(own["head"] for own, _ in both) / len(both)
        before = sum(plain["head"] for _, plain in both) / len(both)
        error = math.sqrt(2 * before * (1 - before) / (both[0][0]["pictures"] * len(both)))
        found.setdefault(f"{dataset} {model}", {})[habit] = {
            "strength": chosen[habit],
            "head": head,
            "difference": head - before,
            "error": error,
            "knn20": sum(own["knn20"] for own, _ in both) / len(both),
            "active": sum(own["active"] for own, _ in both) / len(both),
            "seeds": len(both),
        }
    return found


def main() -> int:
    bench = Benchmark("habits", __doc__)
    add = bench.parser.add_argument
    add("--data", type=Path, default=os.environ.get("SELFMASK_SHARED_DATA", DEFAULT_DATA))
    add("--sets", nargs="+", choices=SETS, default=list(SETS))
    add("--models", nargs="+", choices=("vit", "resnet"), default=["vit", "resnet"])
    add("--pixels", type=int, default=64)
    add("--seeds", nargs="+", type=int, default=[0])
    add("--pictures", type=int, default=320, help="of the training part, 0: all of them")
    add("--epochs", type=float, default=8.0)
    add("--minutes", type=float, default=math.inf, help="start no run after so long")
    options = bench.parse()
    options.data = Path(options.data)
    if not (options.data / WEIGHTS["vit"]).is_file():
        bench.skip(f"no weights and images at {options.data}; give their folder with --data")
        return bench.finish()
    if options.quick:
        options.sets, options.models, options.pixels = ["rbc"], ["vit"], 32
        options.pictures, options.epochs, options.minutes = 128, 0.5, 0.5
    torch.set_num_threads(1)
    grid = Grid(options, Path(options.out or RESULTS / "habits.json"))
    chosen = choose(grid)
    compared = compare(grid, chosen)
    bench.figure("pixels, pictures, epochs", [options.pixels, options.pictures, options.epochs])
    bench.figure("chosen on the held-out part", chosen)
    bench.figure("by set and backbone", compared)
    bench.figure("rows", grid.rows)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
