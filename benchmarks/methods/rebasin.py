"""How far Git Re-Basin lowers the loss barrier between two networks that learned scanned digits apart.

ResNet-18s of several widths and a ViT, from random weights, two of each and seed (`method=rebasin`, as in
`configs/methods/procedures/rebasin.yaml`): the barrier on the straight line between them as they are, after
matching by weights and by activations, and the test accuracy of the two, of their plain average and of the
matched one.

    python benchmarks/methods/rebasin.py [--quick] [--seeds 3] [--epochs 20] [--only NAME ...] --json
"""

import os
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks.harness import Benchmark
from selfmask_dist.cli.demo import BACKBONE, write_digits
from selfmask_dist.cli.train import run
from selfmask_dist.config import load_config

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "methods" / "procedures" / "rebasin.yaml"
COMMON = (
    *("data.flip=false", "data.crop_scale=[0.7, 1.0]", "backbone.crop_pct=1.0", "train.global_batch_size=64"),
    *("backbone.mean=[0.5, 0.5, 0.5]", "backbone.std=[0.5, 0.5, 0.5]"),
    *("eval.knn_k=[20]", "eval.knn_every=0", "eval.probe=false", "eval.frozen_baseline=false"),
    *("engine.device=cpu", "engine.workers=0", "engine.threads=1", "run.progress=false"),
)
_RESNET = "ResNet-18, {} to {} channels"
_WIDTHS = ((8, 64), (16, 128), (32, 256))


def networks() -> dict[str, tuple[str, ...]]:
    """{name: overrides}; the ViT is the demo's, of 0.2 M weights."""
    found: dict[str, tuple[str, ...]] = {}
    for narrow, wide in _WIDTHS:
        channels = [narrow * 2**stage for stage in range(4)]
        found[_RESNET.format(narrow, wide)] = (
            "backbone.image_size=32",
            f"backbone.kwargs={{channels: {channels}}}",
        )
    vit = {key: value for key, value in BACKBONE.items() if key in ("name", "kwargs", "image_size")}
    # it learns more slowly: at the ResNets' rate it stays at chance, and there is no barrier to lower
    slow = ("optim.weight_lr=0.03", "optim.head_lr=0.05", "optim.warmup_epochs=5")
    found["ViT"] = (*(f"backbone.{key}={value}" for key, value in vit.items()), *slow)
    return found


def measure(
    name: str, overrides: tuple[str, ...], seed: int, epochs: float, folder: Path
) -> dict[str, float]:
    """Barriers (nats) and accuracies of one pair of networks."""
    more = 5 if name == "ViT" else 1
    shards = folder / "shards"
    own = [
        *COMMON,
        *overrides,
        *(f"seed={seed}", f"train.epochs={epochs * more}"),
        *(f"data.train={shards / 'train'}", f"data.test={shards / 'test'}"),
        *(f"run.dir={folder}", f"run.name={name}-{seed}"),
    ]
    result = run(load_config(CONFIG, own))
    assert result is not None
    return {
        "barrier as they are": result["barriers"]["as they are"],
        "barrier by weights": result["barriers"]["weights"],
        "barrier by activations": result["barriers"]["activations"],
        "accuracy of the two": statistics.mean(network["head"] for network in result["networks"]),
        "accuracy averaged as they are": result["averaged_as_they_are"]["head"],
        "accuracy averaged when matched": result["adapted"]["head"],
    }


def main() -> int:
    bench = Benchmark("rebasin", __doc__)
    bench.parser.add_argument("--seeds", type=int, default=3)
    bench.parser.add_argument("--epochs", type=float, default=15, help="the ViT has five times as many")
    bench.parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(networks()))
    options = bench.parse()
    names = options.only or list(networks())
    if options.quick:
        names, options.seeds, options.epochs = names[:1], 1, 5
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        write_digits(Path(folder) / "digits", Path(folder) / "shards", list(range(10)))
        for name in names:
            seeds = [
                measure(name, networks()[name], seed, options.epochs, Path(folder))
                for seed in range(options.seeds)
            ]
            for figure in seeds[0]:
                found = [one[figure] for one in seeds]
                bench.figure(f"{name}: {figure}", {"mean": statistics.mean(found), "seeds": found})
            best = [min(one["barrier by weights"], one["barrier by activations"]) for one in seeds]
            before = [one["barrier as they are"] for one in seeds]
            bench.figure(
                f"{name}: barrier left, of 1",
                statistics.mean(best) / statistics.mean(before),
                max=None if name == "ViT" else 0.5,
                quick=False,
            )
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
