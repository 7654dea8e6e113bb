"""Linear probes: what choosing among 50 heads costs over one, and how near scikit-learn's accuracy is.

Embeddings are real: of a small ViT trained on scanned digits 0-4, for digits 5-9; and, with --data, of an
ImageNet ViT-tiny for photographs (a folder with weights/, grocery/ and clothing/). scikit-learn solves the
same problem on the same standardised features, at the strength that the probe's validation chose.

    python -m benchmarks.evals.probe --json [--quick] [--data DIR]
"""

import contextlib
import ctypes
import io
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from sklearn.linear_model import LogisticRegression

from benchmarks.cascade.real import BACKBONES, WEIGHTS, digits_settings, embed_splits, photo_settings
from benchmarks.harness import Benchmark, _high_water, interleave
from selfmask_dist import cli, evals
from selfmask_dist.cli.train import run
from selfmask_dist.config import load_config
from selfmask_dist.evals.probe import prepare
from selfmask_dist.evals.probe_heads import LENGTHS


def embeddings(settings: list[str]) -> list[evals.Embeddings]:
    """Frozen embeddings and labels of both splits."""
    return embed_splits(load_config(None, settings))


def measure(bench: Benchmark, name: str, parts: list[evals.Embeddings], *, epochs: int, rounds: int) -> None:
    train, test, train_labels, test_labels = *(p.features for p in parts), *(p.labels for p in parts)
    bench.figure(f"{name}: samples, dim, classes", [*train.shape, int(train_labels.max()) + 1])
    start = time.perf_counter()
    probe = evals.linear_probe(*parts)
    bench.figure(f"{name}: L-BFGS seconds, 5 strengths and the final fit", time.perf_counter() - start)
    scaled, scaled_test = prepare(train.double(), test.double(), True, evals.Alone())
    reference = LogisticRegression(C=1 / (len(train) * probe.l2), max_iter=5000, tol=1e-6)
    start = time.perf_counter()
    reference.fit(scaled.numpy(), train_labels.numpy())
    bench.figure(f"{name}: scikit-learn seconds, one strength", time.perf_counter() - start)
    theirs = reference.score(scaled_test.numpy(), test_labels.numpy())

    heads = evals.probe_heads(*parts, epochs=epochs)
    one: dict[str, Any] = {
        "grid": ((heads.lr,), (heads.weight_decay,)),
        "epochs": epochs,
    }
    seconds = interleave(
        {
            "one head": lambda: evals.probe_heads(*parts, **one),
            "50 heads": lambda: evals.probe_heads(*parts, epochs=epochs),
        },
        rounds=rounds,
    )
    for what, times in seconds.items():
        bench.figure(f"{name}: {what} seconds", bench.median(times))
    ratio = bench.median(many / single for single, many in zip(*seconds.values(), strict=True))
    bench.figure(f"{name}: heads", len(heads.validation), min=50)
    bench.figure(f"{name}: 50 heads / one head", ratio, max=None if bench.args.busy else 2.0, quick=False)
    bench.figure(f"{name}: scikit-learn accuracy", theirs)
    bench.figure(f"{name}: L-BFGS accuracy", probe.accuracy)
    bench.figure(f"{name}: heads accuracy", heads.accuracy)
    bench.figure(f"{name}: heads chose", {"lr": heads.lr, "weight_decay": heads.weight_decay})
    bench.figure(f"{name}: L-BFGS chose", {"l2": probe.l2})
    bench.figure(
        f"{name}: points between L-BFGS and scikit-learn", 100 * abs(probe.accuracy - theirs), max=0.2
    )
    # a better head misses nothing: only what is lost counts
    bench.figure(
        f"{name}: points lost by the heads", 100 * max(0.0, theirs - heads.accuracy), max=0.2, quick=False
    )


def measure_longer_choice(bench: Benchmark, name: str, parts: list[evals.Embeddings], *, epochs: int) -> None:
    """What choosing early gives up: one head for each decay trained to the end before one is chosen."""
    start = time.perf_counter()
    full = evals.probe_heads(*parts, epochs=epochs, lengths=(LENGTHS[0], 1.0))
    bench.figure(f"{name}: decays to the end, seconds", time.perf_counter() - start)
    bench.figure(f"{name}: decays to the end, accuracy", full.accuracy)


def measure_memory(bench: Benchmark) -> None:
    """What a few steps of the probe take beyond embeddings; all logits would be 458 MiB in float64."""
    ctypes.CDLL(None).mallopt(-3, 65536)  # M_MMAP_THRESHOLD: what is freed goes back at once
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60_000) % 1000
    features = torch.randn(1000, 128, generator=generator)[labels]
    features += 2 * torch.randn(features.shape, generator=generator)
    parts = [evals.Embeddings.of(features[:count], labels[:count]) for count in (60_000, 5_000)]
    few = evals.Embeddings.of(features[:400], labels[:400] % 4)
    evals.linear_probe(few, few)  # what libraries take once
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _high_water()
    evals.linear_probe(*parts, l2=(1e-2, 1e-3), max_iterations=6)
    bench.figure("peak MiB beyond the embeddings, 1,000 classes", (_high_water() - before) / 2**20, max=350)


def measure_command(bench: Benchmark, settings: list[str], folder: Path) -> None:
    """`selfmask eval` on a run of a few steps: with its embedding, and again from the stores."""
    own = ["method=mask", "train.epochs=1", f"run.dir={folder}", "run.name=mask", "run.progress=false"]
    run(load_config(None, [*settings, *own, "eval.frozen_baseline=false", "eval.final=false"]))
    for what in ("first", "second"):
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            assert cli.main(["eval", str(folder / "mask"), "knn", "probe"]) == 0
        bench.figure(f"selfmask eval knn probe, {what} time, seconds", time.perf_counter() - start)


def main() -> int:
    bench = Benchmark("probe", __doc__)
    bench.parser.add_argument("--data", type=Path, help="folder with weights and photographs")
    bench.parser.add_argument("--image-size", type=int, default=96, help="pixels, of the photographs")
    bench.parser.add_argument(
        "--busy", action="store_true", help="the machine has other work: times are noted and promise nothing"
    )
    options = bench.parse()
    bench.figure("times are of a busy machine", options.busy)
    torch.set_num_threads(1)
    epochs, rounds = (60, 1) if options.quick else (300, 3)
    if not options.quick:
        measure_memory(bench)
    with tempfile.TemporaryDirectory() as folder:
        settings = digits_settings(Path(folder))
        digits = embeddings(settings)
        measure(bench, "digits", digits, epochs=epochs, rounds=rounds)
        measure_longer_choice(bench, "digits", digits, epochs=epochs)
        measure_command(bench, settings, Path(folder))
    for dataset in ("grocery",) if options.data and not options.quick else ():
        assert (options.data / WEIGHTS["vit"]).is_file(), f"{options.data} lacks {WEIGHTS['vit']}"
        settings = photo_settings(options.data, dataset, "vit", options.image_size)
        measure(bench, dataset, embeddings(settings), epochs=epochs, rounds=rounds)
    bench.figure("backbone of the photographs", BACKBONES["vit"][0] if options.data else "not measured")
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
