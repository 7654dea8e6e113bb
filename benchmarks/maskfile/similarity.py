"""What masks say about tasks: a ViT trained on scanned digits 0-4 and frozen, three tasks, three seeds.

Tasks: digits 0-4 (what the backbone knows), 5-9 (what it has never seen) and 3-7 (some of both). Masks start
from equal scores, so seeds differ in the order of samples, in augmentation and in the head's first weights.
Asked: are masks of one task more alike than masks of different tasks, and both more than chance?

    python benchmarks/maskfile/similarity.py [--seeds 3] [--epochs 20] [--pictures DIR] [--keep DIR] [--quick]
"""

import json
import sys
import tempfile
from pathlib import Path

from benchmarks.harness import Benchmark
from selfmask_dist.cli.demo import BACKBONE, OLD_DIGITS, write_digits
from selfmask_dist.cli.train import run
from selfmask_dist.config import load_config
from selfmask_dist.maskfile.tools.comparison import MaskResults, masks, read_subjects, table
from selfmask_dist.maskfile.tools.pictures import draw_similarity, draw_sparsity

TASKS = {"digits-0-4": OLD_DIGITS, "digits-5-9": range(5, 10), "digits-3-7": range(3, 8)}
COMMON = [
    *("data.crop_scale=[0.7, 1.0]", "data.flip=false", "optim.warmup_epochs=2", "train.global_batch_size=64"),
    *("eval.knn_k=[20]", "eval.probe=false", "eval.knn_every=10"),
    *("engine.workers=0", "engine.threads=1", "engine.device=cpu", "run.progress=false"),
]


def train(folder: Path, epochs: float, seeds: int) -> list[Path]:
    """The runs' folders, task by task."""
    base = [*COMMON, f"run.dir={folder}"]
    base += [f"backbone.{key}={json.dumps(value)}" for key, value in BACKBONE.items()]
    for name, digits in TASKS.items():
        write_digits(folder / "digits" / name, folder / "shards" / name, list(digits))
    pretrain = [
        *data(folder, "digits-0-4"),
        "method=finetune",
        "eval.frozen_baseline=false",
        "run.name=pretrain",
    ]
    rates = ["optim.weight_lr=0.05", "optim.head_lr=0.05", f"train.epochs={epochs}"]
    run(load_config(None, [*base, *pretrain, *rates]))
    runs = []
    for name in TASKS:
        for seed in range(seeds):
            own = [f"backbone.weights={folder / 'pretrain' / 'encoder.safetensors'}", f"seed={seed}"]
            rates = ["optim.score_lr=100", "optim.head_lr=0.05", f"train.epochs={epochs}"]
            run(load_config(None, [*base, *data(folder, name), *own, *rates, f"run.name={name}-seed{seed}"]))
            runs.append(folder / f"{name}-seed{seed}")
    return runs


def data(folder: Path, name: str) -> list[str]:
    return [f"data.{split}={folder / 'shards' / name / split}" for split in ("train", "test")]


def main() -> int:
    bench = Benchmark("mask_similarity", __doc__)
    bench.parser.add_argument("--epochs", type=float, default=20)
    bench.parser.add_argument("--seeds", type=int, default=3)
    bench.parser.add_argument("--pictures", type=Path, help="folder for the two pictures")
    bench.parser.add_argument(
        "--keep", type=Path, help="leave the runs in this folder, which is not there yet"
    )
    options = bench.parse()
    epochs, seeds = (3.0, 2) if options.quick else (options.epochs, options.seeds)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=options.keep is None)
        results = masks(read_subjects(train(folder, epochs, seeds)))
    print(table(results), file=sys.stderr)
    if options.pictures:
        draw_sparsity(results, options.pictures / "mask_sparsity.png")
        draw_similarity(results, options.pictures / "mask_similarity.png")
    bench.figure("tasks", list(TASKS))
    bench.figure("epochs", epochs)
    bench.figure("seeds", seeds)
    report(bench, results)
    return bench.finish()


def report(bench: Benchmark, results: MaskResults) -> None:
    task_of = {mask.label: mask.label.rpartition("-")[0] for mask in results.masks}
    pairs: dict[str, list[dict[str, float | None]]] = {}
    for pair in results.pairs:
        names = sorted({task_of[pair.a], task_of[pair.b]})
        values = {
            name: getattr(pair.similarity, name) for name in ("phi", "iou_pruned", "iou_kept", "sigmas")
        }
        values |= {
            f"{name}_chance": getattr(pair.similarity, f"{name}_chance") for name in ("phi", "iou_pruned")
        }
        for key in (" and ".join(names), "same task" if len(names) == 1 else "different tasks"):
            pairs.setdefault(key, []).append(values)
    for key, rows in sorted(pairs.items()):
        for name in rows[0]:
            known = [value for row in rows if (value := row[name]) is not None]
            bench.figure(f"{key}: {name}", bench.median(known) if known else None)
    same, apart = (
        bench.median(phi for row in pairs[key] if (phi := row["phi"]) is not None)
        for key in ("same task", "different tasks")
    )
    bench.figure("phi of one task minus phi of different tasks", same - apart, min=0.0, quick=False)
    smallest = min(pair.similarity.sigmas or 0.0 for pair in results.pairs)
    bench.figure("sigmas above chance, smallest of all pairs", smallest, min=5.0, quick=False)
    for mask in results.masks:
        bench.figure(f"{mask.label}: pruned", mask.pruned.share)
    for kind in results.masks[0].kinds:
        shares = [other.share for mask in results.masks for other in mask.kinds if other.name == kind.name]
        bench.figure(f"{kind.name}: pruned", bench.median(shares))


if __name__ == "__main__":
    sys.exit(main())
