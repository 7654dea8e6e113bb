"""Several labels, numbers and label maps on real photographs: frozen, mask, LoRA and full fine-tuning.

The photographs are those of the clothing set whose background is plain, made square. From each, once: its
attributes by its class (worn above the waist, long, ...), the size of the garment (share of the picture,
height, width), and its foreground, which is what differs from the colour of the border by Otsu's threshold.
Every method trains a linear head beside what it trains; frozen is the linear probe. Rates are chosen by the
head's score on a held-out quarter of the training pictures, seed 0, and the test part is measured once.

    python benchmarks/evidence/targets.py --json        18 minutes of a shared core
    python benchmarks/evidence/targets.py --quick
"""

import io
import json
import os
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.evidence.labelfree import DEFAULT_DATA, MODELS, WEIGHTS
from benchmarks.harness import Benchmark
from selfmask_dist.cli.train import run
from selfmask_dist.config import load_config
from selfmask_dist.data.build import build_index

ATTRIBUTES = (
    "above the waist",
    "below the waist",
    "long",
    "short",
    "of the feet",
    "of the head",
    "skirt or dress",
)
OF_CLASS = {
    "dress": (0, 1, 6),
    "hat": (5,),
    "longsleeve": (0, 2),
    "outwear": (0, 2),
    "pants": (1, 2),
    "shirt": (0,),
    "shoes": (4,),
    "shorts": (1, 3),
    "skirt": (1, 6),
    "t-shirt": (0, 3),
}
SIZES = ("share", "height", "width")
KINDS = {"multilabel": "map", "regression": "r2", "dense": "miou"}
METHODS: dict[str, dict[str, list[str]]] = {
    "mask": {
        "reach auto": ["optim.score_step=rms", "optim.score_reach=auto"],
        "reach 0.3": ["optim.score_step=rms", "optim.score_reach=0.3"],
    },
    "LoRA": {
        rate: ["method=finetune", "finetune.train=lora", f"optim.weight_lr={rate}"]
        for rate in ("0.01", "0.1")
    },
    "full": {rate: ["method=finetune", f"optim.weight_lr={rate}"] for rate in ("0.001", "0.01")},
}
SIDE = 96
PLAIN = 30.0  # standard deviation of the border's colours, of 255, of a plain background at most
Row = dict[str, Any]


def foreground(image: Image.Image) -> np.ndarray | None:
    """Return 1 where a picture differs from its border's colour, uint8 (H, W); None without a plain one."""
    pixels = np.asarray(image, dtype=np.float64)
    width = max(min(pixels.shape[:2]) // 16, 1)
    border = np.concatenate(
        [part.reshape(-1, 3) for part in (pixels[:width], pixels[:, :width], pixels[:, -width:])]
    )
    colour = np.median(border, axis=0)
    if np.sqrt(((border - colour) ** 2).mean()) > PLAIN:
        return None
    far = np.sqrt(((pixels - colour) ** 2).sum(axis=2))
    found = (far > otsu(far)).astype(np.uint8)
    return found if 0.05 < found.mean() < 0.8 else None


def otsu(values: np.ndarray) -> float:
    """Return the threshold that separates values into two groups of the smallest variance within."""
    counts, edges = np.histogram(values, bins=128)
    centres = (edges[1:] + edges[:-1]) / 2
    below, above = np.cumsum(counts), counts.sum() - np.cumsum(counts)
    sums = np.cumsum(counts * centres)
    means = sums / np.maximum(below, 1), (sums[-1] - sums) / np.maximum(above, 1)
    return float(centres[np.argmax(below * above * (means[0] - means[1]) ** 2)])


def write_split(source: Path, folder: Path, limit: int) -> int:
    """Write indexed shards of at most `limit` photographs with all three targets; return how many."""
    folder.mkdir(parents=True)
    number = 0
    with tarfile.open(source) as tar, tarfile.open(folder / "a.tar", "w") as out:
        members = [member for member in tar.getmembers() if member.isfile()]
        order = np.random.default_rng(0).permutation(len(members)).tolist()
        for member in (members[i] for i in order):
            file = tar.extractfile(member)
            assert file is not None
            image = Image.open(io.BytesIO(file.read())).convert("RGB").resize((SIDE, SIDE))
            seg = foreground(image)
            if seg is None:
                continue
            rows, columns = (np.flatnonzero(seg.mean(axis=axis) > 0.02) for axis in (1, 0))
            sizes = [seg.mean(), (np.ptp(rows) + 1) / len(seg), (np.ptp(columns) + 1) / seg.shape[1]]
            picture, label_map = io.BytesIO(), io.BytesIO()
            image.save(picture, "JPEG", quality=92)
            Image.fromarray(seg).save(label_map, "PNG")
            about = {
                "labels": list(OF_CLASS[member.name.split("/")[0]]),
                "values": [float(one) for one in sizes],
            }
            for name, content in (
                ("jpg", picture.getvalue()),
                ("json", json.dumps(about).encode()),
                ("seg.png", label_map.getvalue()),
            ):
                info = tarfile.TarInfo(f"{number:05d}.{name}")
                info.size = len(content)
                out.addfile(info, io.BytesIO(content))
            number += 1
            if number == limit:
                break
    build_index(folder)
    return number


def name_outputs(folder: Path, names: tuple[str, ...]) -> None:
    """Index a split anew under the names of what a target gives."""
    build_index(folder, classes=list(names), decode_check=False)


def train(options: Any, kind: str, settings: list[str], parts: list[str], *, probe: bool) -> Row:
    """Run once; return what `result.json` has of the test part, and how long it took."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        config = load_config(
            None,
            [
                *MODELS["vit"],
                f"backbone.weights={options.data / WEIGHTS['vit']}",
                f"backbone.image_size={options.pixels}",
                "backbone.crop_pct=1.0",
                f"objective.target={kind}",
                *parts,
                "data.crop_scale=[0.35, 1.0]" if kind == "multilabel" else "data.augment=false",
                f"train.epochs={options.epochs}",
                "train.global_batch_size=16",
                "optim.warmup_epochs=0.5",
                "eval.knn_every=0",
                "eval.frozen_baseline=false",
                f"eval.probe={str(probe).lower()}",
                "engine.workers=0",
                "engine.threads=1",
                "run.progress=false",
                "run.log_every=50",
                "checkpoint.every_minutes=0",
                f"run.dir={name}",
                "run.name=a",
                *settings,
            ],
        )
        result = run(config)
    scores: Row = result["adapted"] if "adapted" in result else result["frozen"]
    active = {"active": result["mask"]["active"]} if "mask" in result else {}
    return {**scores, **active, "seconds": round(time.perf_counter() - start, 1)}


def compare(options: Any, folder: Path) -> tuple[dict[str, Row], dict[str, Row]]:
    """Return the scores on the test part by target and method, and those that rates were chosen by."""
    table: dict[str, Row] = {}
    choices: dict[str, Row] = {}
    whole = [f"data.train={folder / 'train'}", f"data.test={folder / 'test'}"]
    held = [f"data.train={folder / 'train'}", "data.held_out=0.25"]
    names = {"multilabel": ATTRIBUTES, "regression": SIZES, "dense": ("background", "garment")}
    for kind, score in KINDS.items():
        for split in ("train", "test"):
            name_outputs(folder / split, names[kind])
        frozen = train(options, kind, ["method=probe"], whole, probe=True)
        table[f"{kind}, frozen"] = {name.removeprefix("probe_"): value for name, value in frozen.items()}
        print(f"{kind}, frozen: {frozen}", file=sys.stderr, flush=True)
        for method, rates in METHODS.items():
            found = {rate: train(options, kind, rates[rate], held, probe=False) for rate in rates}
            choices[f"{kind}, {method}"] = {rate: row[f"head_{score}"] for rate, row in found.items()}
            best = max(found, key=lambda rate: found[rate][f"head_{score}"])
            row = train(options, kind, rates[best], whole, probe=False)
            scores = {name.removeprefix("head_"): value for name, value in row.items()}
            table[f"{kind}, {method}"] = {**scores, "setting": best}
            print(f"{kind}, {method}: {table[f'{kind}, {method}']}", file=sys.stderr, flush=True)
    return table, choices


def main() -> int:
    bench = Benchmark("targets", __doc__)
    add = bench.parser.add_argument
    add("--data", type=Path, default=os.environ.get("SELFMASK_SHARED_DATA", DEFAULT_DATA))
    add("--pixels", type=int, default=64)
    add("--pictures", type=int, default=192, help="to train on; as many are measured at most")
    add("--epochs", type=float, default=4.0)
    options = bench.parse()
    options.data = Path(options.data)
    if not (options.data / WEIGHTS["vit"]).is_file():
        bench.skip(f"no weights and images at {options.data}; give their folder with --data")
        return bench.finish()
    if options.quick:
        options.pixels, options.pictures, options.epochs = 32, 64, 0.5
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        numbers = {
            split: write_split(options.data / "clothing" / f"{split}.tar", folder / split, options.pictures)
            for split in ("train", "test")
        }
        table, choices = compare(options, folder)
    bench.figure("pixels, epochs", [options.pixels, options.epochs])
    bench.figure("pictures", numbers)
    bench.figure("chosen on the held-out part", choices)
    bench.figure("test part", table)
    for kind, score in KINDS.items():
        best = max(table[f"{kind}, {method}"][score] for method in METHODS)
        bench.figure(f"{kind}: best method minus frozen", best - table[f"{kind}, frozen"][score])
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
