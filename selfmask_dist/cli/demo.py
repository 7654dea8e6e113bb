"""`selfmask demo`: the whole method in minutes on a laptop.

A small ViT learns digits 0-4, is frozen, and a mask adapts it to digits 5-9; once more without their labels.

    real scanned digits (scikit-learn ships them) -> shards -> pretrain on 0-4 -> freeze -> mask on 5-9
        -> 5-9 as one folder without labels -> mask -> picture

Everything goes through the ordinary path: `data_prep`, `selfmask train`, `selfmask launch` with two
processes.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from selfmask_dist.common import names, text
from selfmask_dist.common.files import write_text
from selfmask_dist.common.plots import pyplot, why_no_pictures
from selfmask_dist.common.shipped import shipped_module

OLD_DIGITS, NEW_DIGITS = range(5), range(5, 10)

# a ViT of 0.2 M weights on 16-pixel pictures, 16 patches
BACKBONE = {
    "name": "timm:vit_tiny_patch16_224",
    "pretrained": False,
    "image_size": 16,
    "crop_pct": 1.0,
    "kwargs": {"patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 4},
}
_DATA = {"crop_scale": [0.7, 1.0], "flip": False}
_COMMON: dict[str, dict[str, Any]] = {
    "train": {"global_batch_size": 64},
    "eval": {"knn_k": [20], "knn_every": 10},
    "engine": {"device": "cpu", "workers": 0, "threads": 1},
}


def add_command(commands: Any) -> None:
    """Add `demo` to the command line."""
    command = commands.add_parser(
        "demo", help="learn a mask on real scanned digits, with two processes, in minutes"
    )
    command.add_argument(
        "--out", default="runs/demo", metavar="DIR", help="where everything goes (runs/demo)"
    )
    command.add_argument("--processes", type=int, default=2, metavar="N", help="training processes (2)")
    command.set_defaults(command=lambda options: run_demo(options.out, num_processes=options.processes))


def run_demo(out: str | Path, *, num_processes: int = 2) -> int:
    """Run the demo into `out` (emptied first); returns the exit status of a training that failed, or 0."""
    started = time.perf_counter()
    out = Path(out)
    if out.exists() and any(out.iterdir()) and not (out / "digits").is_dir():
        raise ValueError(f"{out} holds something else than an earlier demo; give another folder with --out")
    shutil.rmtree(out, ignore_errors=True)
    for name, digits in (("old", OLD_DIGITS), ("new", NEW_DIGITS)):
        write_digits(out / "digits" / name, out / "shards" / name, list(digits))

    print("1. A small ViT is trained on digits 0-4, from scratch.", flush=True)
    pretrain = _config(out, "old", method="finetune", backbone=BACKBONE, name="pretrain", epochs=50)
    if status := _train(pretrain, num_processes):
        return status
    print("\n2. It is frozen. A mask, one bit per weight, is learned for digits 5-9.", flush=True)
    frozen = {**BACKBONE, "weights": str(out / "pretrain" / names.ENCODER)}
    adapt = _config(out, "new", method="mask", backbone=frozen, name="mask", epochs=50)
    if status := _train(adapt, num_processes):
        return status
    print("\n3. The same pictures in one folder, without labels: another mask on the frozen ViT.", flush=True)
    write_unlabelled(out / "digits" / "new" / "train", out / "digits" / "unlabelled", out / "shards")
    if status := _train(_unlabelled_config(out, frozen), num_processes):
        return status

    result = json.loads((out / "mask" / names.RESULT).read_text())
    unlabelled = json.loads((out / "unlabelled" / names.RESULT).read_text())
    unlabelled["adapted"] |= measure(out)
    if reason := why_no_pictures():
        ending = f"The picture is left out: {reason}"
    else:
        ending = f"Picture: {draw(result, unlabelled, _metrics(out / 'mask'), out / 'demo.png')}"
    print(f"\n{table(result, unlabelled)}\n\n{ending}\n{time.perf_counter() - started:.0f} seconds in all.")
    return 0


def write_digits(folder: Path, shards: Path, digits: list[int]) -> None:
    """Write scikit-learn's 8x8 scans as an image folder, every fifth one for testing, and shard it."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    bunch = load_digits()
    for index, (pixels, label) in enumerate(zip(bunch.images, bunch.target, strict=True)):
        if label in digits:
            path = folder / ("test" if index % 5 == 0 else "train") / str(label) / f"{index:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.uint8(pixels * (255 / 16))).save(path)
    shipped_module("data_prep.image_folder").convert_image_folder(folder, shards)


def write_unlabelled(pictures: Path, folder: Path, shards: Path) -> None:
    """Copy all pictures below `pictures` into one folder, and shard it as what has no labels."""
    folder.mkdir(parents=True)
    for path in pictures.rglob("*.png"):
        shutil.copyfile(path, folder / path.name)
    shipped_module("data_prep.image_folder").convert_image_folder(
        folder, shards / "unlabelled", layout="unlabelled"
    )


def measure(out: Path) -> dict[str, float]:
    """Return k-NN and probe of the mask that was learned without labels, on the digits' labels."""
    from selfmask_dist.config import load_config
    from selfmask_dist.evals.measure import Evaluation
    from selfmask_dist.parallel import World
    from selfmask_dist.training.build import build_backbone, open_data
    from selfmask_dist.training.saving import read_outcome

    labelled = [f"data.{split}={out / 'shards' / 'new' / split}" for split in ("train", "test")]
    config = load_config(out / "unlabelled" / names.CONFIG, labelled)
    backbone = build_backbone(config)
    read_outcome(out / "unlabelled").put_on(backbone.encoder)
    return Evaluation(config, backbone, *open_data(config), World()).full(probe=True)


def table(result: dict[str, Any], unlabelled: dict[str, Any]) -> str:
    """Return what the demo found as text: frozen against masked, and bytes against bytes."""
    frozen, mask = result["frozen"], result["mask"]
    columns = (frozen, result["adapted"], unlabelled["adapted"])
    rows = [["digits 5-9, test accuracy", "frozen", "masked", "masked without labels"]]
    for key, name in (("knn20", "k-NN (20)"), ("probe", "linear probe"), ("head", "its own linear head")):
        rows.append([name, *(f"{part[key]:.3f}" if key in part else text.NONE for part in columns)])
    return (
        f"{text.table(rows)}\n\n"
        f"The mask takes {mask['bytes']:,} bytes ({mask['bits_per_weight']:.2f} bits per weight, "
        f"{mask['active']:.1%} kept), the weights under it {mask['weight_bytes']:,}: "
        f"{mask['weight_bytes'] / mask['bytes']:.0f} times as much."
    )


def draw(
    result: dict[str, Any], unlabelled: dict[str, Any], metrics: list[dict[str, Any]], path: Path
) -> Path:
    """Write one picture and return its path: accuracy, its course, what is pruned by layer, and bytes."""
    from selfmask_dist.maskfile.tools.pictures import draw_shares  # imports torch

    plt = pyplot()
    figure, ((bars, course), (layers, size)) = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    figure.suptitle("A ViT trained on digits 0-4 and frozen, adapted to digits 5-9 by one bit per weight")
    frozen, adapted, mask = result["frozen"], result["adapted"], result["mask"]

    # frozen and masked stand beside each other under their own names: a legend would cover bars
    shown = [(f"{name},\n{view}", values[key], color)
             for key, name in (("knn20", "k-NN"), ("probe", "probe"))
             for view, values, color in (("frozen", frozen, "C7"), ("labels", adapted, "C0"),
                                         ("no labels", unlabelled["adapted"], "C2"))]  # fmt: skip
    labels, heights, colors = zip(*shown, strict=True)
    drawn = bars.bar(labels, heights, color=colors)
    bars.bar_label(drawn, fmt="%.3f")
    bars.set(
        ylim=(0, 1.12),
        ylabel="test accuracy",
        title="Accuracy on 5-9: frozen, masked with labels and without",
    )

    monitor = [(line["step"], line["monitor/knn20"]) for line in metrics if "monitor/knn20" in line]
    course.plot(*zip((0, frozen["knn20"]), *monitor, strict=True), marker="o")
    course.set(xlabel="step", ylabel="test accuracy", title="k-NN while the mask is learned")

    active = [line for line in metrics if "mask/active_by_parameter" in line][-1]["mask/active_by_parameter"]
    pruned = {name: 1 - share for name, share in active.items() if name.endswith("weight")}
    draw_shares(layers, {"mask": pruned}, title="What the mask prunes, by layer")

    drawn = size.bar(["weights", "mask"], [mask["weight_bytes"], mask["bytes"]], color=["C7", "C0"])
    size.bar_label(drawn, labels=[f"{mask['weight_bytes']:,} B", f"{mask['bytes']:,} B"])
    size.set(
        yscale="log",
        ylabel="bytes",
        title="Stored for the new task",
        ylim=(mask["bytes"] / 3, mask["weight_bytes"] * 3),
    )
    for axes in (bars, course, layers, size):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _config(out: Path, digits: str, *, method: str, backbone: dict[str, Any], name: str, epochs: int) -> Path:
    shards = out / "shards" / digits
    settings: dict[str, Any] = {
        **_COMMON,
        "method": method,
        "backbone": backbone,
        "data": {**_DATA, "train": str(shards / "train"), "test": str(shards / "test")},
        "train": {**_COMMON["train"], "epochs": epochs},
        "optim": {"score_lr": 100.0, "weight_lr": 0.05, "head_lr": 0.05, "warmup_epochs": 2},
        "run": {"dir": str(out), "name": name, "log_every": 40},
    }
    if method == "finetune":  # from random weights: their frozen numbers say nothing
        settings["eval"] = {**_COMMON["eval"], "frozen_baseline": False, "probe": False}
    return _write(settings, out / f"{name}.yaml")


def _write(settings: dict[str, Any], path: Path) -> Path:
    from selfmask_dist.config import load_config, to_yaml

    write_text(path, json.dumps(settings))  # which is YAML too
    write_text(path, to_yaml(load_config(path)))  # checked, and complete
    return path


def _unlabelled_config(out: Path, backbone: dict[str, Any]) -> Path:
    """Write the run without labels: the objective's defaults, crops for small scans, no test part."""
    settings: dict[str, Any] = {
        "method": "mask",
        "objective": {"name": "nbd"},
        "backbone": backbone,
        "data": {"train": str(out / "shards" / "unlabelled"), "flip": False},
        "nbd": {"crop_scale": [0.6, 1.0]},
        "train": {"epochs": 24},
        "eval": {"knn_k": [20], "knn_every": 0},
        "engine": _COMMON["engine"],
        "run": {"dir": str(out), "name": "unlabelled", "log_every": 40},
    }
    return _write(settings, out / "unlabelled.yaml")


def _train(config: Path, num_processes: int) -> int:
    command = [sys.executable, "-m", "selfmask_dist.cli", "launch", "--cluster", "local"]
    command += ["--nodes", str(num_processes)]
    return subprocess.run([*command, "--config", str(config)], check=False).returncode


def _metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / names.METRICS).read_text().splitlines()]
