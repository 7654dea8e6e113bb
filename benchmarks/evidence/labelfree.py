"""Adapting without labels on real photographs: frozen against masks, other adapters and other objectives.

Every cell is one data set, one backbone and one size of pictures. Each method trains on the training part
with the one default of `objective.name=nbd` (or the one setting that stands here for the others), for as many
steps as any other, and is measured as the frozen backbone is: k-NN (k = 20, T = .07), k-NN of whitened
embeddings, a linear probe, and instance retrieval, which needs no labels and decides whether the mask is to
be used. Errors are standard errors of differences to the frozen backbone, paired over the test pictures.

A row that is in the result file already is not run again, so the whole grid can be made in pieces:

    python benchmarks/evidence/labelfree.py --json               what is missing of the grid: hours
    python benchmarks/evidence/labelfree.py --sets grocery --models vit --pixels 64 --seeds 0 --methods nbd
    python benchmarks/evidence/labelfree.py --split val ... key=value       to try settings
"""

import itertools
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import RESULTS, Benchmark
from selfmask_dist.backbones import Backbone
from selfmask_dist.cli.train import run
from selfmask_dist.config import load_config
from selfmask_dist.data import eval_loader, eval_transform
from selfmask_dist.evals.embed import embed
from selfmask_dist.evals.embeddings import Embeddings
from selfmask_dist.evals.knn import knn_vote
from selfmask_dist.evals.low_shot import low_shot
from selfmask_dist.evals.probe import linear_probe
from selfmask_dist.evals.search import search
from selfmask_dist.parallel import World
from selfmask_dist.parallel.pca import fit_pca
from selfmask_dist.training.build import build_backbone, open_data
from selfmask_dist.training.saving import read_outcome

DEFAULT_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
SETS = ("grocery", "clothing", "rbc", "deepweeds")
MODELS = {
    "vit": [
        "backbone.name=timm:vit_tiny_patch16_224",
        "backbone.mean=[0.5, 0.5, 0.5]",
        "backbone.std=[0.5, 0.5, 0.5]",
    ],
    "resnet": ["backbone.name=timm:resnet18", "backbone.remove=[layer4]", "engine.channels_last=true"],
    "mobilenet": [
        "backbone.name=timm:mobilenetv2_100",
        "backbone.kwargs={pad_type: same}",
        "engine.channels_last=true",
        "backbone.mean=[0.5, 0.5, 0.5]",
        "backbone.std=[0.5, 0.5, 0.5]",
    ],
}
WEIGHTS = {
    "vit": "weights/vit_tiny_patch16_224.in1k.fp16.safetensors",
    "resnet": "weights/resnet18_layer1to3.in1k.fp16.safetensors",
    "mobilenet": "weights/mobilenetv2_100.in1k.fp16.safetensors",
}
ALL = [
    "backbone.crop_pct=1.0",
    "backbone.batchnorm=frozen",
    "train.global_batch_size=128",
    "optim.score_step=rms",
    "optim.score_reach=auto",
    "eval.knn_every=0",
    "engine.workers=0",
    "engine.threads=1",
    "run.progress=false",
    "run.log_every=50",
    "checkpoint.every_minutes=0",
]
MILD = [
    "crops.global_scale=[0.35, 1.0]",
    "crops.local_count=0",
    "crops.color=0.375",
    "crops.gray=0",
    "crops.blur=0",
]
ADAPTER = ["method=finetune", "optim.kind=adamw", "optim.weight_lr=0.001"]
METHODS: dict[str, list[str]] = {
    "nbd": ["objective.name=nbd"],
    "nbd, LoRA r=4": ["objective.name=nbd", *ADAPTER, "finetune.train=lora", "finetune.lora_rank=4"],
    "nbd, biases": ["objective.name=nbd", *ADAPTER, "finetune.train=bias"],
    "swav": [
        *("objective.name=swav", *MILD, "swav.prototypes=120", "swav.epsilon=0.02", "swav.queue_length=512"),
        *("optim.head_lr=0.1", "swav.freeze_steps=10"),
    ],
    "simclr": ["objective.name=simclr", *MILD, "optim.head_lr=0.1"],
}
FEW_LABELS = (0.1, 0.04, 0.01)
Row = dict[str, Any]


def held_out(options: Any, dataset: str, folder: Path) -> list[str]:
    """The parts to train and measure on; a fifth of the training part where there is none for validation.

    Of the training part `--pictures` are taken, at equal distances through it.
    """
    train, other = (options.data / dataset / f"{split}.tar" for split in ("train", options.split))
    has_part = options.split == "test" or other.exists()
    settings = [f"data.train={train}", f"data.test={other if has_part else train}"]
    source, _ = open_data(load_config(None, settings))
    ids = np.arange(len(source))
    if not has_part:
        np.save(folder / f"{dataset}-test.npy", ids[ids % 5 == 0])
        settings.append(f"data.test_subset={folder / f'{dataset}-test.npy'}")
        ids = ids[ids % 5 != 0]
    if 0 < options.pictures < len(ids):
        ids = ids[np.arange(options.pictures) * len(ids) // options.pictures]
    np.save(folder / f"{dataset}-train.npy", ids)
    return [*settings, f"data.subset={folder / f'{dataset}-train.npy'}"]


class Cell:
    """One data set, backbone and size: the frozen embeddings, and every method measured against them."""

    def __init__(self, options: Any, dataset: str, model: str, pixels: int, folder: Path) -> None:
        self.folder = folder
        self.epochs = options.epochs
        self.extra = options.overrides
        self.base = [
            *MODELS[model],
            f"backbone.weights={options.data / WEIGHTS[model]}",
            f"backbone.image_size={pixels}",
            *held_out(options, dataset, folder),
            *ALL,
        ]
        self.config = load_config(None, self.base)
        self.train, self.test = open_data(self.config)
        start = time.perf_counter()
        self.frozen = self.embed(build_backbone(self.config))
        self.embed_seconds = time.perf_counter() - start
        self.frozen_hits = self.measure(self.frozen)
        self.frozen_few = self.few_labels(self.frozen)

    def embed(self, backbone: Backbone) -> tuple[Embeddings, Embeddings]:
        transform = eval_transform(backbone.spec.preprocessing)
        bank, queries = (
            embed(backbone.encoder, eval_loader(source, transform, batch_size=128), world=World())
            for source in (self.train, self.test)
        )
        return bank, queries

    def measure(self, embedded: tuple[Embeddings, Embeddings]) -> dict[str, Tensor]:
        """Which test pictures each measure gets right, bool (m,)."""
        bank, queries = embedded
        pca = fit_pca([bank.features], num_components=128, at_most=True)
        white = [pca.transform(part.features, whiten=True) for part in (bank, queries)]
        probe = linear_probe(bank, queries)
        return {
            "knn": self.knn(bank.features, queries.features, bank.labels) == queries.labels,
            "whitened knn": self.knn(white[0], white[1], bank.labels) == queries.labels,
            "probe": probe.predictions == queries.labels,
        }

    def few_labels(self, embedded: tuple[Embeddings, Embeddings]) -> dict[str, tuple[float, ...]]:
        """The probe's accuracy on a few of the labels (the paper's figure 3), in each of five draws."""
        found = low_shot(*embedded, shares=FEW_LABELS)
        return {f"{share:g}": result.accuracies for share, result in found.items()}

    def knn(self, bank: Tensor, queries: Tensor, labels: Tensor) -> Tensor:
        similar, ids = search(bank, queries, k=20)
        return knn_vote(similar, labels[ids], temperature=0.07, num_classes=len(self.train.classes))

    def row(self, method: Sequence[str], seed: int) -> Row:
        """Train with a method's settings, measure, and compare with the frozen backbone."""
        place = [f"run.dir={self.folder}", "run.name=run", "run.overwrite=true", f"seed={seed}"]
        epochs = [f"train.epochs={self.epochs:g}", f"optim.warmup_epochs={self.epochs / 10:g}"]
        settings = [*self.base, *epochs, *place, *method, *self.extra]
        # a run without a test part measures instance retrieval alone
        untested = [entry for entry in settings if not entry.startswith("data.test")]
        start = time.perf_counter()
        result = run(load_config(None, untested))
        seconds = time.perf_counter() - start
        backbone = build_backbone(load_config(None, settings))
        read_outcome(self.folder / "run").put_on(backbone.encoder)
        embedded = self.embed(backbone)
        hits = self.measure(embedded)
        found: Row = {"minutes": seconds / 60, "steps": result["steps"], "retrieval": result["retrieval"]}
        if "mask" in result:
            found |= {"bytes": result["mask"]["bytes"], "active": result["mask"]["active"]}
        else:
            found["bytes"] = result["stored_bytes"]
        for name, after in hits.items():
            before = self.frozen_hits[name]
            difference = after.double() - before.double()
            found[name] = {
                "frozen": before.double().mean().item(),
                "adapted": after.double().mean().item(),
                "difference": difference.mean().item(),
                "error": difference.std().item() / math.sqrt(len(difference)),
            }
        found["few labels"] = {
            share: {"frozen": list(self.frozen_few[share]), "adapted": list(after)}
            for share, after in self.few_labels(embedded).items()
        }
        shutil.rmtree(self.folder / "run")
        return found


def known_rows(path: Path) -> dict[str, Row]:
    """The rows of a result file, and of the one beside it that an interrupted run left."""
    rows: dict[str, Row] = {}
    for place in (path, path.with_suffix(".partial.json")):
        if place.exists():
            rows |= json.loads(place.read_text())["figures"].get("rows", {})
    return rows


def grid(options: Any) -> Iterator[tuple[str, str, int]]:
    yield from itertools.product(options.sets, options.models, options.pixels)


def summarise(rows: dict[str, Row], bench: Benchmark) -> None:
    """The shares that the targets are about, over the cells with `nbd` rows, seeds taken together."""
    cells: dict[str, list[Row]] = {}
    for key, row in rows.items():
        cell, _, _ = key.rpartition(", seed ")
        if ", rate " not in cell:  # older rows, at another rate than the default's
            cells.setdefault(cell, []).append(row)
    gains: dict[str, float] = {}
    by_decision: dict[str, list[float]] = {}
    ratio: list[float] = []
    for cell, found in cells.items():
        name, _, method = cell.rpartition(" | ")
        if method != "nbd":
            continue
        t = [row["knn"]["difference"] / max(row["knn"]["error"], 1e-9) for row in found]
        gains[name] = sum(t) / len(t)
        for row in found:
            decision = (row["retrieval"] or {}).get("decision", "neutral")
            by_decision.setdefault(decision, []).append(
                row["knn"]["difference"] / max(row["knn"]["error"], 1e-9)
            )
        lora = cells.get(f"{name} | nbd, LoRA r=4", [])
        if lora:
            ratio.append(
                sum(r["bytes"] for r in found) / len(found) / (sum(r["bytes"] for r in lora) / len(lora))
            )
    if not gains:
        return
    bench.figure("cells", len(gains))
    bench.figure("gain in standard errors, by cell", gains)
    # what is neutral is not used: the frozen backbone stays
    used = by_decision.get("adapted", [0.0])
    bench.figure("worst accepted run, in standard errors", min(used), min=-1.0, quick=False)
    for decision, gained in by_decision.items():
        bench.figure(f"runs: {decision}", len(gained))
        bench.figure(f"worst and best run, in standard errors: {decision}", [min(gained), max(gained)])
    share = sum(gain >= 2 for gain in gains.values()) / len(gains)
    bench.figure("share of cells at least two errors above frozen", share, min=0.8, quick=False)
    if ratio:
        bench.figure("bytes of the mask over LoRA's", sum(ratio) / len(ratio), max=0.1, quick=False)


def table(rows: dict[str, Row]) -> str:
    lines = [f"{'cell':62} {'k-NN':>16} {'whitened':>16} {'probe':>16} {'R':>12} {'KB':>7} {'min':>5}"]
    for key, row in sorted(rows.items()):
        parts = [
            f"{row[name]['frozen']:.3f} {100 * row[name]['difference']:+5.1f}±{100 * row[name]['error']:.1f}"
            for name in ("knn", "whitened knn", "probe")
        ]
        found = row["retrieval"] or {}
        retrieval = (
            f"{100 * (found['adapted'] - found['frozen']):+.0f} {found['decision'][:7]}" if found else "-"
        )
        lines.append(
            f"{key:62} {' '.join(f'{part:>16}' for part in parts)} {retrieval:>12} "
            f"{row['bytes'] / 1024:7.1f} {row['minutes']:5.1f}"
        )
    return "\n".join(lines)


def main() -> int:
    bench = Benchmark("labelfree", __doc__)
    add = bench.parser.add_argument
    add("--data", type=Path, default=os.environ.get("SELFMASK_SHARED_DATA", DEFAULT_DATA))
    add("--sets", nargs="+", choices=SETS, default=list(SETS))
    add("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    add("--pixels", nargs="+", type=int, default=[64, 128])
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    add("--pictures", type=int, default=1024, help="of the training part, 0: all of them")
    add("--epochs", type=float, default=8.0)
    add("--split", choices=("test", "val"), default="test", help="val: to try settings")
    add("--minutes", type=float, default=math.inf, help="start no row after so long")
    add("overrides", nargs="*", metavar="key=value", help="settings over this benchmark's, with --split val")
    options = bench.parse()
    if options.overrides and options.split != "val":
        bench.parser.error("settings are tried with --split val, not on the test part")
    if not (options.data / WEIGHTS["vit"]).is_file():
        bench.skip(f"no weights and images at {options.data}; give their folder with --data")
        return bench.finish()
    if options.quick:
        options.sets, options.models, options.pixels = ["clothing"], ["vit"], [32]
        options.seeds, options.methods, options.epochs, options.split = [0], ["nbd"], 0.5, "val"
    torch.set_num_threads(1)
    known = Path(options.out or RESULTS / "labelfree.json")
    is_kept = options.split == "test" and not options.quick
    rows: dict[str, Row] = known_rows(known) if is_kept else {}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        for dataset, model, pixels in grid(options):
            cell: Cell | None = None
            for seed, method in itertools.product(options.seeds, options.methods):
                size = f"{options.pictures} pictures" if options.pictures else "all pictures"
                key = f"{dataset} {model} {pixels} px {size} | {method}, seed {seed}"
                if key in rows or time.perf_counter() - start > 60 * options.minutes:
                    continue
                cell = cell or Cell(options, dataset, model, pixels, Path(name))
                rows[key] = cell.row(METHODS[method], seed) | {"epochs": options.epochs}
                print(table({key: rows[key]}).splitlines()[1], file=sys.stderr, flush=True)
                if is_kept:  # a kill loses one row
                    partial = known.with_suffix(".partial.json")
                    partial.write_text(json.dumps({"figures": {"rows": rows}}))
    print(table(rows), file=sys.stderr)
    bench.figure("split", options.split)
    summarise(rows, bench)
    bench.figure("rows", rows)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
