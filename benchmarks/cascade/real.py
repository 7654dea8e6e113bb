"""A whole cascade on real images: frozen, self-masked, conditional and unconditional, by k-NN and probe.

`digits`: a small ViT is trained on scanned digits 0-4 from scratch, frozen, and adapted to digits 5-9 without
labels (scikit-learn ships the pictures). `grocery`, `clothing`: an ImageNet ViT-tiny or ResNet-18 trunk and
real photographs (`--data`). The paper trains 117,188 steps at 224 pixels on GPUs; the sizes here are a CPU's.

The combinations end in a whitened PCA, which by itself changes a k-NN. So frozen and self-masked embeddings
are measured whitened as well: what experts add is the difference to those. An expert has also made twice the
dispatcher's steps; so the dispatcher is trained on for as long, on all images, for comparison.

Settings are chosen with `--validate`, which trains the dispatcher alone and never looks at the test images:
it measures on a fifth of the digits' training images that it leaves out, and on the photographs' own
validation part.

    python benchmarks/cascade/real.py [--dataset digits] [--seeds 3] [--epochs N] [--quick] --json [key=value]
    python benchmarks/cascade/real.py --validate [--dataset digits] [--seeds 1] [--try KEY=VALUE] ...
"""

import contextlib
import itertools
import os
import shutil
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Benchmark
from selfmask_dist import apply_masks
from selfmask_dist.cascade import Combination, fit_pca
from selfmask_dist.cli.demo import BACKBONE, NEW_DIGITS, OLD_DIGITS, write_digits
from selfmask_dist.cli.train import run
from selfmask_dist.config import Config, load_config
from selfmask_dist.config.yaml import flow
from selfmask_dist.data import eval_loader, eval_transform
from selfmask_dist.evals.embed import Embeddings, embed
from selfmask_dist.evals.measure import measure_knn, measure_probe
from selfmask_dist.evals.store import EmbeddingStore
from selfmask_dist.parallel import World
from selfmask_dist.runs.folder import run_path
from selfmask_dist.training.build import build_backbone, open_data

DEFAULT_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
VIEWS = ("frozen", "self-masked", "conditional", "unconditional")
TRAINED_ON = "self-masked, trained on"
COMMON = [
    "eval.knn_k=[20]",
    "eval.knn_every=0",
    "engine.workers=0",
    "engine.threads=1",
    "run.log_every=50",
    "cascade.combinations=[conditional, unconditional, replace, conditional_add, unconditional_add, "
    "conditional_pca, unconditional_pca]",
]
SWAV = ["objective.name=swav", "optim.head_lr=0.15", "optim.head_weight_decay=1e-6"]
DIGITS = ["data.flip=false", "cascade.clusters=[3]", "cascade.components=10", "eval.batch_size=64"]
SWAV_DIGITS = [
    "crops.global_scale=[0.6, 1.0]",
    "crops.local_count=2",
    "crops.local_size=8",
    "crops.local_scale=[0.25, 0.6]",
    "crops.color=0.4",
    "crops.gray=0",
    "crops.blur=0",
    "swav.prototypes=30",
    "swav.dim=32",
    "swav.epsilon=0.01",  # with the paper's 0.05 the loss stays at log(30): nothing is learned
    "swav.freeze_steps=30",
    "train.global_batch_size=64",
    "optim.score_lr=300",
]
PHOTOS = ["cascade.clusters=[3]", "engine.channels_last=true"]
SWAV_PHOTOS = [
    "crops.global_scale=[0.25, 1.0]",
    "crops.local_count=2",
    "crops.local_size=32",
    "crops.local_scale=[0.1, 0.4]",
    "crops.blur=0",
    "swav.prototypes=60",
    "swav.epsilon=0.01",
    "swav.freeze_steps=10",
    "train.global_batch_size=32",
    "optim.score_lr=50",
    "optim.head_first_epochs=2",  # without it the features fall before the projector has learned anything
    "engine.precision=bf16",
]
# the objective's own defaults, and crops as mild for scans of 8 pixels
NBD = ["objective.name=nbd"]
OF_OBJECTIVE = {
    "swav": {"digits": [*SWAV, *SWAV_DIGITS], "photos": [*SWAV, *SWAV_PHOTOS]},
    "nbd": {"digits": [*NBD, "nbd.crop_scale=[0.6, 1.0]"], "photos": NBD},
}
# fruit, vegetables and cartons are told apart by their colours, to which SwAV's views make features blind
SWAV_OF_DATASET = {"grocery": ["crops.color=0.2", "crops.gray=0"]}
SETS = ("digits", "grocery", "clothing", "deepweeds", "rbc")
BACKBONES = {
    "vit": [
        "backbone.name=timm:vit_tiny_patch16_224",
        "backbone.mean=[0.5, 0.5, 0.5]",
        "backbone.std=[0.5, 0.5, 0.5]",
    ],
    "resnet": ["backbone.name=timm:resnet18", "backbone.remove=[layer4]"],
}
WEIGHTS = {
    "vit": "weights/vit_tiny_patch16_224.in1k.fp16.safetensors",
    "resnet": "weights/resnet18_layer1to3.in1k.fp16.safetensors",
}


def digits_settings(folder: Path) -> list[str]:
    """Train and freeze the small ViT on digits 0-4; settings of the cascade on 5-9."""
    for name, digits in (("old", OLD_DIGITS), ("new", NEW_DIGITS)):
        if not (folder / "shards" / name / "test").exists():
            write_digits(folder / "digits" / name, folder / "shards" / name, list(digits))
    backbone = [f"backbone.{key}={flow(value)}" for key, value in BACKBONE.items()]
    pretrain = [
        *backbone,
        *_data(folder / "shards" / "old" / "train", folder / "shards" / "old" / "test"),
        *("method=finetune", "data.crop_scale=[0.7, 1.0]", "data.flip=false", "train.epochs=50"),
        *("optim.weight_lr=0.05", "optim.head_lr=0.05", "optim.warmup_epochs=2", "eval.knn_every=0"),
        *("eval.frozen_baseline=false", "eval.probe=false", "engine.workers=0", "engine.threads=1"),
        *(f"run.dir={folder}", "run.name=pretrain", "run.progress=false"),
        f"run.resume={(folder / 'pretrain' / 'config.yaml').exists()}",
    ]
    run(load_config(None, pretrain))
    new = _data(folder / "shards" / "new" / "train", folder / "shards" / "new" / "test")
    return [*backbone, f"backbone.weights={folder / 'pretrain' / 'encoder.safetensors'}", *new, *DIGITS]


def photo_settings(data: Path, dataset: str, kind: str, image_size: int) -> list[str]:
    return [
        *BACKBONES[kind],
        f"backbone.weights={data / WEIGHTS[kind]}",
        f"backbone.image_size={image_size}",
        "backbone.crop_pct=1.0",
        *_data(data / dataset / "train.tar", data / dataset / "test.tar"),
        *PHOTOS,
    ]


def _data(train: Path, test: Path) -> list[str]:
    return [f"data.train={train}", f"data.test={test}"]


def validation_part(base: list[str], data: Path, dataset: str, folder: Path) -> list[str]:
    """Where settings are chosen: the photographs' validation part, a fifth of the digits' training images."""
    if dataset != "digits":
        return [f"data.test={data / dataset / 'val.tar'}"]
    source, _ = open_data(load_config(None, base))
    is_held_out = np.arange(len(source)) % 5 == 0
    paths = {}
    for key, chosen in (("subset", ~is_held_out), ("test_subset", is_held_out)):
        paths[key] = folder / f"validate-{key}.npy"
        np.save(paths[key], np.flatnonzero(chosen))
    train = next(entry for entry in base if entry.startswith("data.train="))
    return [f"data.{key}={path}" for key, path in paths.items()] + [train.replace("train=", "test=", 1)]


def validate(bench: Benchmark, base: list[str], options: Any, folder: Path) -> None:
    """The dispatcher alone on the validation part, and the frozen backbone beside it: with the settings here,
    and with each of `--try`.
    """
    part = validation_part(base, options.data, options.dataset, folder)
    own = ["method=mask", f"train.epochs={options.epochs}", *options.overrides]
    place = [f"run.dir={folder}", "run.progress=false", "run.overwrite=true", "eval.probe=false"]
    for number, tried in enumerate(("", *options.tries)):
        found = []
        for seed in range(options.seeds):
            is_first = number == seed == 0
            name = [f"seed={seed}", f"run.name=validate-{number}-{seed}", f"eval.frozen_baseline={is_first}"]
            result = run(load_config(None, [*base, *COMMON, *part, *own, *place, *name, *tried.split()]))
            if is_first:
                bench.figure("frozen knn20", result["frozen"]["knn20"])
            found.append(result["adapted"]["knn20"])
        bench.figure(f"self-masked knn20, {tried or 'settings as they are'}", found)
    bench.figure("epochs", options.epochs)


def embed_splits(config: Config, mask_path: Path | None = None) -> list[Embeddings]:
    """Train and test under a mask, or as the backbone is."""
    backbone, parts = build_backbone(config), []
    if mask_path is not None:
        apply_masks(backbone.encoder, mask_path)
    for source in open_data(config):
        loader = eval_loader(source, eval_transform(backbone.spec.preprocessing), batch_size=64)
        parts.append(embed(backbone.encoder, loader, world=World()))
    return parts


def trained_on(overrides: list[str], cascade: Path) -> dict[str, dict[str, float]]:
    """The dispatcher trained on for as long as an expert, on all images: what more steps alone would give."""
    own = ["method=mask", f"mask.init_from={cascade / 'dispatcher'}", f"run.name={cascade.name}-trained-on"]
    own += ["optim.head_first_epochs=0", "eval.frozen_baseline=false", "eval.retrieval=false"]
    config = load_config(None, [*overrides, *own])
    plain = run(config)["adapted"]
    world, parts = World(), embed_splits(config, run_path(config) / "final.mask")
    bank = parts[0].features
    pca = fit_pca([bank], num_components=bank.shape[1], at_most=True)
    train, test = (replace(part, features=pca.transform(part.features, whiten=True)) for part in parts)
    classes = len(train.labels.unique())
    knn = measure_knn(train, test, (20,), config.eval.knn_temperature, num_classes=classes, world=world)
    whitened = {**knn, "probe": measure_probe(train, test, seed=config.seed, world=world)}
    return {TRAINED_ON: plain, f"{TRAINED_ON}, whitened": whitened}


def rounding(run: Path) -> dict[str, float]:
    """What keeping a combination's matrix in float16 does to the embeddings of the test images."""
    parts = ["dispatcher", *(path.name for path in sorted(run.glob("expert-*")))]
    views: dict[str, tuple[Tensor, list[Tensor], Tensor]] = {}
    for split in ("train", "test"):
        stores = [EmbeddingStore.open(run / "embeddings" / part / split).read_slice() for part in parts]
        first, *others = (rows.features for rows in stores)
        views[split] = (first, others, torch.from_numpy(np.load(run / "router" / f"{split}.npy")))
    found = {}
    for mode in ("conditional", "unconditional"):
        exact = Combination.fit([views["train"]], mode=mode, num_experts=len(parts) - 1)
        bank, queries = (F.normalize(exact.transform(*views[split])) for split in views)
        rounded = exact.rounded()
        kept_bank, kept = (F.normalize(rounded.transform(*views[split])) for split in views)
        moved = (kept - queries).norm(dim=1).max()
        nearest, now = (queries @ bank.T).argmax(dim=1), (kept @ kept_bank.T).argmax(dim=1)
        found[f"{mode}, float16: largest move of a unit embedding"] = float(moved)
        found[f"{mode}, float16: test images with another nearest neighbour"] = float((nearest != now).sum())
    return found


def _add_arguments(bench: Benchmark) -> None:
    bench.parser.add_argument("--dataset", choices=SETS, default="digits")
    bench.parser.add_argument("--objective", choices=tuple(OF_OBJECTIVE), default="swav")
    bench.parser.add_argument(
        "--data", type=Path, default=os.environ.get("SELFMASK_SHARED_DATA", DEFAULT_DATA)
    )
    bench.parser.add_argument(
        "--backbone", choices=tuple(BACKBONES), default="resnet", help="of the photographs"
    )
    bench.parser.add_argument("--image-size", type=int, default=48, help="pixels, of the photographs")
    bench.parser.add_argument("--epochs", type=float, help="default: 50 of the digits, 6 of the photographs")
    bench.parser.add_argument("--seeds", type=int, default=3)
    bench.parser.add_argument(
        "--validate", action="store_true", help="the dispatcher alone, away from the test images; see above"
    )
    bench.parser.add_argument(
        "--try",
        dest="tries",
        action="append",
        default=[],
        metavar="'KEY=VALUE ...'",
        help="of --validate: settings to measure besides, as often as wanted",
    )
    bench.parser.add_argument(
        "--keep", type=Path, help="work in this folder, and go on with what is there (a temporary one)"
    )
    bench.parser.add_argument("--picture", type=Path, help="where the first seed's picture goes")
    bench.parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings over this benchmark's"
    )


def main() -> int:
    bench = Benchmark("cascade_real", __doc__)
    _add_arguments(bench)
    options = bench.parse()
    if options.dataset != "digits" and not (options.data / WEIGHTS[options.backbone]).is_file():
        bench.skip(f"no weights and images at {options.data}; give their folder with --data")
        return bench.finish()
    bench.name += "" if options.objective == "swav" else f"_{options.objective}"
    bench.name += "" if options.dataset == "digits" else f"_{options.dataset}"
    bench.name += "_validate" if options.validate else ""
    if options.epochs is None:
        options.epochs = 50.0 if options.dataset == "digits" else 6.0
    epochs, seeds = (2.0, 1) if options.quick else (options.epochs, options.seeds)
    results, roundings = [], []
    with contextlib.ExitStack() as stack:
        folder = str(options.keep or stack.enter_context(tempfile.TemporaryDirectory()))
        if options.dataset == "digits":
            base = digits_settings(Path(folder))
        else:
            base = photo_settings(options.data, options.dataset, options.backbone, options.image_size)
        base += OF_OBJECTIVE[options.objective]["digits" if options.dataset == "digits" else "photos"]
        if options.objective == "swav":
            base += [f"swav.queue_start_epoch={epochs / 5}", *SWAV_OF_DATASET.get(options.dataset, [])]
        if options.validate:
            validate(bench, base, options, Path(folder))
            return bench.finish()
        for seed in range(seeds):
            own = ["method=cascade", f"seed={seed}", f"train.epochs={epochs}", f"run.dir={folder}"]
            own += [f"optim.warmup_epochs={epochs / 10:g}"] if options.objective == "nbd" else []
            place = ["run.progress=false", f"run.name=seed-{seed}"]
            place.append(f"run.resume={(Path(folder) / f'seed-{seed}' / 'config.yaml').exists()}")
            overrides = [*base, *COMMON, *own, *place, *options.overrides]
            result = run(load_config(None, overrides))
            cascade = Path(folder) / f"seed-{seed}"
            results.append({**result, "views": result["views"] | trained_on(overrides, cascade)})
            roundings.append(rounding(cascade))
        if options.picture:
            shutil.copy(Path(folder) / "seed-0" / "cascade.png", options.picture)
    bench.figure("dataset", options.dataset)
    bench.figure("epochs", epochs)
    bench.figure("seeds", seeds)
    bench.figure(
        "settings", [entry for entry in overrides if folder not in entry and str(options.data) not in entry]
    )
    _report(bench, results)
    for name in roundings[0]:
        bench.figure(name, max(values[name] for values in roundings))
    return bench.finish()


def _report(bench: Benchmark, results: list[dict[str, Any]]) -> None:
    means: dict[tuple[str, str], float] = {}
    for view in results[0]["views"]:
        for measure in ("knn20", "probe"):
            values = [result["views"][view][measure] for result in results]
            means[view, measure] = statistics.mean(values)
            bench.figure(f"{view} {measure}", means[view, measure])
            bench.figure(f"{view} {measure} spread", max(values) - min(values))
    for earlier, later in itertools.pairwise(VIEWS):
        for measure in ("knn20", "probe"):
            gain = means[later, measure] - means[earlier, measure]
            bench.figure(f"{later} minus {earlier}, {measure}", gain, min=0.0, quick=False)
    for view in ("conditional", "unconditional"):
        # alike in the whitened PCA, and in that and the number of steps
        for other in ("self-masked, whitened", f"{TRAINED_ON}, whitened"):
            gain = means[view, "knn20"] - means[other, "knn20"]
            bench.figure(f"{view} minus {other}, knn20", gain, min=0.0, quick=False)
    bench.figure("bundle bytes", statistics.mean(result["mask"]["bytes"] for result in results))
    bench.figure(
        "masks apart bytes", statistics.mean(result["mask"]["bytes_of_masks_apart"] for result in results)
    )
    bench.figure("clusters", [result["clusters"] for result in results])


if __name__ == "__main__":
    sys.exit(main())
