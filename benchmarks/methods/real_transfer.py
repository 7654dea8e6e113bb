"""A pretrained ViT-tiny on real photographs: frozen, probed, fine-tuned and masked, on one budget.

Real ImageNet weights and real images (grocery: 81 classes of smartphone pictures; clothing: 10 classes). Both
runs see the same batches, epochs, augmentation and head; only what is trained differs. The scores' learning
rate is the paper's for ViTs, the weights' and the head's are the package's defaults.

    python benchmarks/methods/real_transfer.py --data DIR [--dataset grocery] [--epochs 10] [--quick] --json
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness import Benchmark
from selfmask_dist.cli.train import run
from selfmask_dist.config import load_config

WEIGHTS = "weights/vit_tiny_patch16_224.in1k.fp16.safetensors"
DEFAULT_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


def settings(data: Path, dataset: str, split: str, out: Path, *, epochs: float, image_size: int) -> list[str]:
    return [
        "backbone.name=timm:vit_tiny_patch16_224",
        f"backbone.weights={data / WEIGHTS}",
        f"backbone.image_size={image_size}",
        "backbone.crop_pct=1.0",
        "backbone.mean=[0.5, 0.5, 0.5]",
        "backbone.std=[0.5, 0.5, 0.5]",
        f"data.train={data / dataset / 'train.tar'}",
        f"data.test={data / dataset / f'{split}.tar'}",
        "data.crop_scale=[0.4, 1.0]",
        "optim.score_lr=10",
        "optim.weight_lr=0.01",
        "optim.head_lr=0.1",
        "optim.warmup_epochs=0.5",
        f"train.epochs={epochs}",
        "train.global_batch_size=32",
        "eval.knn_k=[20]",
        "eval.knn_every=0",
        "engine.workers=0",
        f"run.dir={out}",
        "run.log_every=20",
    ]


def main() -> int:
    bench = Benchmark("real_transfer", __doc__)
    bench.parser.add_argument(
        "--data", type=Path, default=os.environ.get("SELFMASK_SHARED_DATA", DEFAULT_DATA)
    )
    bench.parser.add_argument("--dataset", choices=("grocery", "clothing"), default="grocery")
    bench.parser.add_argument("--split", choices=("test", "val"), default="test", help="val: to try settings")
    bench.parser.add_argument("--epochs", type=float, default=10)
    bench.parser.add_argument("--image-size", type=int, default=96, help="pixels")
    bench.parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings over this benchmark's"
    )
    options = bench.parse()
    if not (options.data / WEIGHTS).is_file():
        bench.skip(f"no weights and images at {options.data}; give their folder with --data")
        return bench.finish()
    epochs, image_size = (0.25, 64) if options.quick else (options.epochs, options.image_size)
    with tempfile.TemporaryDirectory() as folder:
        base = settings(
            options.data, options.dataset, options.split, Path(folder), epochs=epochs, image_size=image_size
        )
        results: dict[str, Any] = {}
        for method in ("mask", "finetune"):
            own = [f"method={method}", f"run.name={method}", f"eval.frozen_baseline={method == 'mask'}"]
            results[method] = run(load_config(None, [*base, *own, *options.overrides]))
    frozen, masked, finetuned = (
        results["mask"]["frozen"],
        results["mask"]["adapted"],
        results["finetune"]["adapted"],
    )
    bench.figure("dataset", options.dataset)
    bench.figure("epochs", epochs)
    bench.figure("image_size", image_size)
    bench.figure("frozen_knn20", frozen["knn20"])
    bench.figure("frozen_probe", frozen["probe"])
    for name, values in (("masked", masked), ("finetuned", finetuned)):
        for key, value in values.items():
            bench.figure(f"{name}_{key}", value)
    bench.figure("masked_minus_frozen_knn20", masked["knn20"] - frozen["knn20"], min=0.05, quick=False)
    bench.figure("masked_minus_finetuned_head", masked["head"] - finetuned["head"], min=-0.02, quick=False)
    bench.figure("masked_minus_finetuned_probe", masked["probe"] - finetuned["probe"])
    bench.figure("masked_minus_finetuned_knn20", masked["knn20"] - finetuned["knn20"])
    mask = results["mask"]["mask"]
    for key in ("masked_weights", "active", "bytes", "weight_bytes"):
        bench.figure(f"mask_{key}", mask[key])
    bench.figure("mask_bits_per_weight", mask["bits_per_weight"], max=1.0)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
