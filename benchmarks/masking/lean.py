"""What holding numbers in bf16 costs and saves: bytes of a masked weight, and masks and accuracy.

Three parts. `--part bytes`: the peak of memory of a ViT-S/16 with one image of 64 pixels, where the state
dominates, for every mode beside full fine-tuning (SGD, AdamW) and LoRA of rank 8, all with
engine.precision=bf16 but the first; peaks in a fresh process each, as bytes for each masked weight, beside
what the arithmetic and the planner say. `--part times`: the same with eight images, in turns, in seconds of
the processor. `--part masks`: supervised masks on a pretrained ViT-tiny and real
photographs of 64 pixels, three seeds, with every mode; the mask is put on the float32 backbone and measured
on held-out pictures in float32. What a mode changes is held against what another batch order (seed) changes.

Finished trainings are kept in a file (`--rows`), so that an interrupted benchmark goes on where it was.

    python -m benchmarks.masking.lean [--part bytes|times|masks|all] [--data DIR] [--quick] --json
"""

import itertools
import json
import math
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Benchmark, interleave, peak_memory, ratio_to_first
from benchmarks.masking.lean_steps import (
    FLOORS,
    MODES,
    SMALL,
    TINY,
    make_step,
    planned_bytes,
    run_steps,
)
from selfmask_dist.cli.train import run
from selfmask_dist.config import load_config
from selfmask_dist.data import eval_loader, eval_transform
from selfmask_dist.evals.embed import embed
from selfmask_dist.evals.knn import knn_vote
from selfmask_dist.evals.search import search
from selfmask_dist.maskfile import read_mask_file
from selfmask_dist.parallel import World
from selfmask_dist.training.build import build_backbone, open_data
from selfmask_dist.training.saving import read_outcome

DEFAULT_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
SET = "grocery"
COMMON = (
    "backbone.name=timm:vit_tiny_patch16_224",
    "backbone.image_size=64",
    "backbone.crop_pct=1.0",
    "backbone.mean=[0.5,0.5,0.5]",
    "backbone.std=[0.5,0.5,0.5]",
    "optim.score_step=rms",
    "optim.score_reach=auto",
    "optim.warmup_epochs=0.3",
    "eval.knn_every=0",
    "eval.frozen_baseline=false",
    "eval.final=false",
    "engine.device=cpu",
    "engine.workers=0",
    "engine.threads=1",
    "run.progress=false",
    "run.overwrite=true",
)
Row = dict[str, Any]


def main() -> int:
    bench = Benchmark("lean", __doc__)
    bench.parser.add_argument("--part", choices=("bytes", "times", "masks", "all"), default="all")
    bench.parser.add_argument(
        "--data", type=Path, default=Path(os.environ.get("SELFMASK_SHARED_DATA", DEFAULT_DATA))
    )
    bench.parser.add_argument("--rows", type=Path, help="where finished trainings are kept")
    bench.parser.add_argument("--pictures", type=int, default=512, help="to train on (default: 512)")
    bench.parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="two or more (default: 0 1 2)"
    )
    bench.parser.add_argument("--epochs", type=float, default=3.0, help="(default: 3)")
    options = bench.parse()
    if options.part in ("bytes", "all"):
        measure_bytes(bench, quick=options.quick)
    if options.part in ("times", "all"):
        measure_times(bench, quick=options.quick)
    if options.part in ("masks", "all"):
        if not (options.data / SET).is_dir():
            bench.skip(f"no folder {SET} in {options.data}; name the shared photographs by --data")
            return bench.finish()
        measure_masks(bench, options)
    return bench.finish()


# ---- bytes


def measure_bytes(bench: Benchmark, *, quick: bool) -> None:
    """Record peaks, bytes for each weight and times of every mode.

    What a process needs whatever the model is (libraries, their caches) is what a model of two narrow blocks
    needs there; it is measured and taken off.
    """
    # freed memory goes back to the system at once, so that the resident size is what is alive
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    model = TINY if quick else SMALL
    names = ["masked float32", "masked bf16 weights", "full sgd"] if quick else list(MODES)
    fixed = {
        kind: 0 if quick else peak_memory(run_steps, kind, TINY) for kind in dict.fromkeys(map(_kind, names))
    }
    bench.figure("fixed_mib", {kind: one / 2**20 for kind, one in fixed.items()})
    table: dict[str, dict[str, float]] = {}
    for name in names:
        peak = peak_memory(run_steps, name, model) - fixed[_kind(name)]
        planned, num_weights = planned_bytes(name, model)
        table[name] = {
            "arithmetic": FLOORS[name],
            "planned": planned / num_weights,
            "measured": peak / num_weights,
            "peak_mib": peak / 2**20,
        }
        print(name, table[name], file=sys.stderr, flush=True)
        if name.startswith("masked"):  # a tiny model's peak is that of libraries
            bench.figure(f"{name}, planned / measured", planned / peak, min=0.9, max=1.1, quick=False)
        else:
            del table[name]["planned"]  # it plans masks
    del os.environ["MALLOC_MMAP_THRESHOLD_"]
    bench.figure("bytes_per_masked_weight", table)
    for base, limit in {"full sgd": 1.0, "full adamw": 0.7, "lora": None}.items():
        for name in names:
            if base in table and name.startswith("masked bf16 weights"):
                ratio = table[name]["peak_mib"] / table[base]["peak_mib"]
                bench.figure(f"{name} / {base}, peak", ratio, max=limit, quick=False)


def measure_times(bench: Benchmark, *, quick: bool) -> None:
    """Record the time of a step in every mode, in turns, and over full fine-tuning's."""
    names, size = (["masked bf16 weights", "full sgd"], 2) if quick else (list(MODES), 8)
    steps = {name: make_step(name, TINY if quick else SMALL, size=size) for name in sorted(names)}
    times = interleave(steps, rounds=2 if quick else 5, clock=time.thread_time)
    bench.figure("seconds", {name: bench.median(values) for name, values in times.items()})
    order = {"full sgd": times.pop("full sgd"), **times}
    for name, ratio in ratio_to_first(order).items():
        if name != "full sgd":
            bench.figure(f"{name} / full sgd, time", ratio)


def _kind(name: str) -> str:
    """Return the mode whose libraries are those of another."""
    if name.startswith("masked bf16 weights"):
        return "masked bf16 weights"
    return name if name == "masked float32" else "full sgd"


# ---- masks


def measure_masks(bench: Benchmark, options: Any) -> None:
    """Train with every mode and seed, and hold masks and accuracies against float32's."""
    rows_path = (
        options.rows or Path(tempfile.gettempdir()) / f"lean{'.quick' if options.quick else ''}.rows.json"
    )
    rows: dict[str, Row] = json.loads(rows_path.read_text()) if rows_path.exists() else {}
    modes = {name: keys for name, keys in MODES.items() if name.startswith("masked")}
    seeds, epochs, pictures = options.seeds, options.epochs, options.pictures
    if options.quick:
        modes, seeds, epochs, pictures = dict(list(modes.items())[-2:]), [0, 1], 0.25, 64
        modes = {"masked float32": MODES["masked float32"], **modes}
    with tempfile.TemporaryDirectory() as folder:
        base = [*COMMON, *_data(options.data, pictures, Path(folder)), f"train.epochs={epochs:g}"]
        base += ["train.global_batch_size=32", f"run.dir={folder}"]
        for seed, name in itertools.product(seeds, modes):
            key = f"{name}/{seed}/{pictures}/{epochs:g}"
            if key not in rows:
                rows[key] = _train(base, modes[name], name, seed)
                rows_path.write_text(json.dumps(rows))
            print(f"{key}: k-NN {rows[key]['knn']:.4f}", file=sys.stderr, flush=True)
    found = {name: [rows[f"{name}/{seed}/{pictures}/{epochs:g}"] for seed in seeds] for name in modes}
    _summarise(bench, found)


def _data(data: Path, pictures: int, folder: Path) -> list[str]:
    settings = [f"data.train={data / SET / 'train.tar'}", f"data.test={data / SET / 'val.tar'}"]
    source, _ = open_data(load_config(None, settings))
    ids = np.arange(pictures) * len(source) // pictures if pictures < len(source) else np.arange(len(source))
    np.save(folder / "train.npy", ids)
    weights = data / "weights" / "vit_tiny_patch16_224.in1k.fp16.safetensors"
    return [*settings, f"data.subset={folder / 'train.npy'}", f"backbone.weights={weights}"]


def _train(base: list[str], keys: tuple[str, ...], name: str, seed: int) -> Row:
    start = time.thread_time()
    config = load_config(None, [*base, *keys, f"run.name={name.replace(' ', '-')}", f"seed={seed}"])
    run(config)
    seconds = time.thread_time() - start
    folder = Path(config.run.dir) / config.run.name
    backbone = build_backbone(load_config(None, base))  # float32
    read_outcome(folder).put_on(backbone.encoder)
    train, test = open_data(config)
    transform = eval_transform(backbone.spec.preprocessing)
    bank, queries = (
        embed(backbone.encoder, eval_loader(source, transform, batch_size=128), world=World())
        for source in (train, test)
    )
    similar, ids = search(bank.features, queries.features, k=20)
    votes = knn_vote(similar, bank.labels[ids], temperature=0.07, num_classes=len(train.classes))
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    bits = next(iter(read_mask_file(folder / "final.mask").masks.values())).bits
    flat = torch.cat([bits[key].flatten() for key in sorted(bits)])
    return {
        "knn": (votes == queries.labels).double().mean().item(),
        "loss": [line["loss"] for line in metrics if "loss" in line][-1],
        "kept": flat.double().mean().item(),
        "seconds": seconds,
        "bits": np.packbits(flat.numpy()).tobytes().hex(),
    }


def _summarise(bench: Benchmark, found: dict[str, list[Row]]) -> None:
    exact = found["masked float32"]
    bits = {name: [_bits(row) for row in rows] for name, rows in found.items()}
    orders = [_differ(a, b) for a, b in itertools.combinations(bits["masked float32"], 2)]
    bench.figure("seeds", len(exact))
    bench.figure("bits that differ, another batch order", statistics.mean(orders))
    bench.figure("kept, float32", statistics.mean(row["kept"] for row in exact))
    for name, rows in found.items():
        knn = [row["knn"] for row in rows]
        bench.figure(f"{name}, k-NN", statistics.mean(knn))
        bench.figure(f"{name}, k-NN of each seed", knn)
        bench.figure(f"{name}, loss", statistics.mean(row["loss"] for row in rows))
        bench.figure(f"{name}, seconds", statistics.mean(row["seconds"] for row in rows))
        if name == "masked float32":
            error = statistics.stdev(knn) / math.sqrt(len(knn))
            bench.figure("standard error of k-NN over seeds, float32", error)
            continue
        differ = statistics.mean(map(_differ, bits[name], bits["masked float32"]))
        bench.figure(f"{name}, bits that differ from float32", differ)
        change = statistics.mean(row["knn"] - other["knn"] for row, other in zip(rows, exact, strict=True))
        # both means have an error, and pairs of one seed share their batches
        pair = [row["knn"] - other["knn"] for row, other in zip(rows, exact, strict=True)]
        bench.figure(f"{name}, k-NN minus float32's", change)
        bench.figure(f"{name}, standard error of that", statistics.stdev(pair) / math.sqrt(len(pair)))
        bench.figure(
            f"{name}, |change| in float32's standard errors",
            abs(change) / max(error, 1e-9),
            max=1.0,
            quick=False,
        )


def _bits(row: Row) -> Tensor:
    return torch.from_numpy(np.frombuffer(bytes.fromhex(row["bits"]), dtype=np.uint8).copy())


def _differ(one: Tensor, other: Tensor) -> float:
    """Return the share of mask bits that differ."""
    return int(np.unpackbits((one ^ other).numpy()).sum()) / (8 * len(one))


if __name__ == "__main__":
    sys.exit(main())
