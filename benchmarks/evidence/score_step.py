"""One learning rate for every architecture? Score steps of one size (`rms`) against plain SGD, with labels.

Supervised masks on pretrained backbones and real pictures, over a grid of learning rates for each kind of
step and nothing else changed: same batches, head, warm-up and number of steps. What is judged is the mean of
k-NN (k = 20, T = .07) and the head's accuracy on a validation part: the set's own where it has one, and every
fourth training picture, 600 of them at most. Test pictures are not read.

    best        the best rate of each architecture, by the mean over sets and seeds
    loss        what is lost where the one rate that serves all best is used in place of each architecture's
                own, and the same for each pair of architecture and set
    spread      standard deviation over the rates of the grid: how much it matters which one is taken
    neighbour   what is lost by a rate three times smaller or larger than the best, which does not depend on
                where a grid begins and ends

A loop of one's own with `attach` and `bind(score_step=...)`. Finished runs are kept in a file (`--runs`), so
that an interrupted grid goes on where it was. A run is 15 to 20 seconds of one core.

    python -m benchmarks.evidence.score_step [--data DIR] [--seeds 0 1] [--steps 80] [--quick] --json
"""

import argparse
import copy
import itertools
import json
import math
import os
import statistics
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from benchmarks.harness import Benchmark
from selfmask_dist import attach
from selfmask_dist.evals.knn import knn_vote

DEFAULT_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
GRID = {"rms": (0.001, 0.003, 0.01, 0.03), "plain": (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 50.0)}
HALF, IMAGENET = ((0.5,) * 3, (0.5,) * 3), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
WEIGHTS = {
    "vit_tiny": "vit_tiny_patch16_224.in1k.fp16.safetensors",
    "resnet18": "resnet18_layer1to3.in1k.fp16.safetensors",
    "clip": "clip_vit_b32.safetensors",  # none is at hand where this was written: said, not measured
}
HELD_OUT = 4  # every fourth training picture
NUM_HELD_OUT, BANK = 600, 600  # at most of them, and about so many neighbours to choose from
MARGIN = 12  # pixels around a crop


@dataclass(frozen=True)
class Try:
    """One training: what its result is filed under."""

    architecture: str
    dataset: str
    kind: str
    rate: float
    seed: int
    steps: int
    batch: int
    size: int


@dataclass(frozen=True)
class Pictures:
    """Normalised pictures of a set, larger than a crop by a margin, and their labels."""

    train: Tensor
    train_labels: Tensor
    held_out: Tensor
    held_out_labels: Tensor
    num_classes: int


# ---- what a run is made of


def read_tar(path: Path, side: int) -> tuple[list[np.ndarray], list[str]]:
    """Return a tar's pictures, (side, side, 3) uint8 each, and their classes, which are folders' names."""
    pictures, classes = [], []
    with tarfile.open(path) as tar:
        for member in sorted(tar.getmembers(), key=lambda m: m.name):
            file = tar.extractfile(member)
            if file is None:
                continue
            image = Image.open(BytesIO(file.read())).convert("RGB")
            short = min(image.size)
            left, top = (image.width - short) // 2, (image.height - short) // 2
            square = image.crop((left, top, left + short, top + short))
            pictures.append(np.asarray(square.resize((side, side), Image.Resampling.BICUBIC)))
            classes.append(member.name.split("/")[0])
    return pictures, classes


@cache
def load_pictures(folder: Path, architecture: str, size: int) -> Pictures:
    """Read a set; its test pictures stay unread."""
    pictures, classes = read_tar(folder / "train.tar", size + MARGIN)
    is_held_out = [index % HELD_OUT == 0 for index in range(len(pictures))]
    if (folder / "val.tar").is_file():
        more, of_more = read_tar(folder / "val.tar", size + MARGIN)
        pictures, classes, is_held_out = pictures + more, classes + of_more, is_held_out + [True] * len(more)
    names = sorted(set(classes))
    labels = torch.tensor([names.index(name) for name in classes])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (HALF if "vit" in architecture else IMAGENET))
    tensors = (torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255 - mean) / std
    held_out = torch.tensor(is_held_out)
    chosen = held_out.nonzero().flatten()
    chosen = chosen[torch.linspace(0, len(chosen) - 1, min(NUM_HELD_OUT, len(chosen))).long()]
    return Pictures(tensors[~held_out], labels[~held_out], tensors[chosen], labels[chosen], len(names))


def load_encoder(architecture: str, data: Path, size: int) -> nn.Module:
    """Return a pretrained backbone in eval mode; the ResNet without the stage that its file lacks."""
    overlay = {"file": str(data / "weights" / WEIGHTS[architecture])}
    if architecture == "vit_tiny":
        name = "vit_tiny_patch16_224"
        return timm.create_model(
            name, img_size=size, num_classes=0, pretrained=True, pretrained_cfg_overlay=overlay
        ).eval()
    from safetensors.torch import load_file

    model = timm.create_model("resnet18", num_classes=0)
    model.layer4 = nn.Identity()
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(overlay["file"]).items()})
    return model.eval()


def crops(pictures: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Return a random crop of each picture, half of them mirrored."""
    places = torch.randint(0, MARGIN + 1, (len(pictures), 2), generator=generator).tolist()
    mirrored = torch.rand(len(pictures), generator=generator) < 0.5
    found = [p[:, y : y + size, x : x + size] for p, (y, x) in zip(pictures, places, strict=True)]
    batch = torch.stack(found)
    return torch.where(mirrored.view(-1, 1, 1, 1), batch.flip(-1), batch)


@torch.no_grad()
def features_of(encoder: nn.Module, pictures: Tensor, size: int) -> Tensor:
    """Return the features of the pictures' centres."""
    begin = MARGIN // 2
    centres = pictures[:, :, begin : begin + size, begin : begin + size]
    return torch.cat([encoder(part) for part in centres.split(128)])


def first_head(features: Tensor, labels: Tensor, num_classes: int) -> nn.Module:
    """Return a linear head on standardised features, trained on those of the frozen backbone."""
    norm = nn.BatchNorm1d(features.shape[1], affine=False).eval()
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(features.mean(0))
    norm.running_var.copy_(features.var(0))
    head = nn.Sequential(norm, nn.Linear(features.shape[1], num_classes)).eval()
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3, weight_decay=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(head(features), labels, label_smoothing=0.1).backward()
        optimizer.step()
    return head


def knn_accuracy(bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, classes: int) -> float:
    """Return the k-NN accuracy, k = 20 and T = .07."""
    sims, ids = (F.normalize(queries) @ F.normalize(bank).T).topk(20)
    found = knn_vote(sims, bank_labels[ids], temperature=0.07, num_classes=classes)
    return (found == labels).double().mean().item()


@cache
def frozen_start(architecture: str, dataset: Path, size: int) -> nn.Module:
    """Return the head that all runs of an architecture and a set start with; copies of it are trained."""
    pictures = load_pictures(dataset, architecture, size)
    encoder = load_encoder(architecture, dataset.parent, size)
    bank, labels = bank_of(pictures)
    return first_head(features_of(encoder, bank, size), labels, pictures.num_classes)


def bank_of(pictures: Pictures) -> tuple[Tensor, Tensor]:
    """Return the training pictures that a k-NN searches, and their labels."""
    stride = max(len(pictures.train) // BANK, 1)
    return pictures.train[::stride], pictures.train_labels[::stride]


def train_masks(one: Try, encoder: nn.Module, head: nn.Module, pictures: Pictures) -> int:
    """Train masks on the encoder together with the head; returns how many weights they switch off."""
    masks = attach(encoder)
    scores = torch.optim.SGD(masks.parameters(), lr=one.rate, momentum=0.9)
    masks.bind(scores, score_step="rms" if one.kind == "rms" else "plain")
    heads = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=1e-2)
    draw = torch.Generator().manual_seed(one.seed)
    epochs = -(-one.steps * one.batch // len(pictures.train))
    order = torch.cat([torch.randperm(len(pictures.train), generator=draw) for _ in range(epochs)])
    for step in range(one.steps):
        rows = order[step * one.batch : (step + 1) * one.batch]
        scores.param_groups[0]["lr"] = one.rate * schedule(step, one.steps)
        scores.zero_grad()
        heads.zero_grad()
        logits = head(encoder(crops(pictures.train[rows], one.size, draw)))
        F.cross_entropy(logits, pictures.train_labels[rows], label_smoothing=0.1).backward()
        scores.step()
        heads.step()
    return sum(int((~mask).sum()) for mask in masks.masks().values())


def measure(one: Try, data: Path) -> dict[str, float]:
    """Train and measure on the held-out part. Kind `frozen`: nothing but the head is trained."""
    pictures = load_pictures(data / one.dataset, one.architecture, one.size)
    encoder = load_encoder(one.architecture, data, one.size)
    head = copy.deepcopy(frozen_start(one.architecture, data / one.dataset, one.size))
    off = train_masks(one, encoder, head, pictures) if one.kind != "frozen" else 0
    bank, bank_labels = bank_of(pictures)
    features, labels = features_of(encoder, pictures.held_out, one.size), pictures.held_out_labels
    knn = knn_accuracy(
        features_of(encoder, bank, one.size), bank_labels, features, labels, pictures.num_classes
    )
    with torch.no_grad():
        of_head = (head(features).argmax(1) == labels).double().mean().item()
    return {"knn": knn, "head": of_head, "score": (knn + of_head) / 2, "off": off, "n": len(labels)}


def schedule(step: int, steps: int) -> float:
    """Return the share of the rate at a step: a tenth of linear warm-up, then a cosine to zero."""
    warm = max(steps // 10, 1)
    if step < warm:
        return (step + 1) / warm
    return (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1))) / 2


# ---- what comes of them


class Table:
    """Scores of finished runs, kept in a file of one JSON line each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.done = {json.dumps(line["try"]): line["result"] for line in map(json.loads, lines)}

    def get(self, one: Try, make: Callable[[Try], dict[str, float]]) -> dict[str, float]:
        """Return a run's result; one that is not there yet is made and kept."""
        key = json.dumps(asdict(one))
        if key not in self.done:
            self.done[key] = make(one)
            with self.path.open("a") as file:
                file.write(json.dumps({"try": asdict(one), "result": self.done[key]}) + "\n")
            print(f"{one} {self.done[key]}", file=sys.stderr, flush=True)
        return self.done[key]


def mean_and_error(values: Iterable[float]) -> tuple[float, float | None]:
    """Return the mean and its standard error over what was averaged; None for one value."""
    found = list(values)
    error = statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else None
    return statistics.fmean(found), error


Scores = dict[tuple[str, str, int], dict[float, float]]  # (architecture, set, seed): {rate: score}


def summarise(scores: Scores) -> dict[str, Any]:
    """Return best rates, what one rate for all loses, and the spread over the grid, of one kind of step."""
    rates = list(next(iter(scores.values())))
    architectures = sorted({key[0] for key in scores})
    cells = sorted({key[:2] for key in scores})

    def mean(rate: float, start: tuple[str, ...]) -> float:
        return statistics.fmean(row[rate] for key, row in scores.items() if key[: len(start)] == start)

    means = {a: {rate: mean(rate, (a,)) for rate in rates} for a in architectures}
    best = {a: max(rates, key=means[a].__getitem__) for a in architectures}
    common = max(rates, key=lambda rate: statistics.fmean(means[a][rate] for a in architectures))
    of_cells = {cell: {rate: mean(rate, cell) for rate in rates} for cell in cells}
    lost = {f"{a}, {d}": max(row.values()) - row[common] for (a, d), row in of_cells.items()}
    neighbours = [_loss_of_neighbours(list(row.values())) for row in of_cells.values()]
    neighbour, neighbour_error = mean_and_error(itertools.chain(*neighbours))
    spread, spread_error = mean_and_error(statistics.pstdev(row.values()) for row in scores.values())
    worst, worst_error = mean_and_error(max(row.values()) - min(row.values()) for row in scores.values())
    return {
        "mean_score": {a: {f"{rate:g}": score for rate, score in row.items()} for a, row in means.items()},
        "best_rate": {a: f"{rate:g}" for a, rate in best.items()},
        "best_score": {a: means[a][rate] for a, rate in best.items()},
        "common_rate": f"{common:g}",
        "loss_of_one_rate": {a: means[a][best[a]] - means[a][common] for a in architectures},
        "loss_of_one_rate_by_set": lost,
        "largest_loss_of_one_rate": max(lost.values()),
        "neighbour_loss": neighbour,
        "neighbour_loss_error": neighbour_error,
        "spread": spread,
        "spread_error": spread_error,
        "best_minus_worst": worst,
        "best_minus_worst_error": worst_error,
    }


def _loss_of_neighbours(row: list[float]) -> list[float]:
    """Return what the rates below and above the best one lose; at an end of the grid there is but one."""
    best = row.index(max(row))
    return [max(row) - row[index] for index in (best - 1, best + 1) if 0 <= index < len(row)]


def compare(bench: Benchmark, tables: dict[str, Scores], steps: int) -> None:
    """Record what both kinds of step come to, and their differences run by run."""
    found = {kind: summarise(scores) for kind, scores in tables.items()}
    for kind, values in found.items():
        for name, value in values.items():
            bench.figure(f"{kind}_{name}", value)
    keys = list(tables["rms"])
    best = [max(tables["rms"][key].values()) - max(tables["plain"][key].values()) for key in keys]
    mean, error = mean_and_error(best)
    bench.figure("best_rms_minus_best_plain", mean)
    bench.figure("best_rms_minus_best_plain_error", error)
    bench.figure(
        "best_rms_minus_best_plain_each",
        {", ".join(map(str, key)): value for key, value in zip(keys, best, strict=True)},
    )
    one = {kind: float(values["common_rate"]) for kind, values in found.items()}
    served = [tables["rms"][key][one["rms"]] - tables["plain"][key][one["plain"]] for key in keys]
    mean, error = mean_and_error(served)
    bench.figure("one_rate_rms_minus_one_rate_plain", mean)
    bench.figure("one_rate_rms_minus_one_rate_plain_error", error)
    bench.figure(
        "spread_rms_over_plain", found["rms"]["spread"] / found["plain"]["spread"], max=1.0, quick=False
    )
    bench.target("rms_largest_loss_of_one_rate", max=0.02, quick=False)
    bench.figure("steps", steps)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sizes of the grid."""
    parser.add_argument("--data", type=Path, default=os.environ.get("SELFMASK_SHARED_DATA", DEFAULT_DATA))
    parser.add_argument("--architectures", nargs="+", default=["vit_tiny", "resnet18", "clip"])
    parser.add_argument("--datasets", nargs="+", default=["clothing", "deepweeds"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=48, help="pixels")
    parser.add_argument("--rms", nargs="+", type=float, default=GRID["rms"], help="rates")
    parser.add_argument("--plain", nargs="+", type=float, default=GRID["plain"], help="rates")
    kept = Path(tempfile.gettempdir()) / "selfmask-score-step.jsonl"
    parser.add_argument("--runs", type=Path, default=kept, help="where finished runs are kept")


def main() -> int:
    """Run the grid and write what came of it."""
    bench = Benchmark("score_step", __doc__)
    arguments(bench.parser)
    options = bench.parse()
    if options.quick:
        options.seeds, options.steps, options.datasets = [0], 10, options.datasets[:1]
        options.rms, options.plain = options.rms[1:3], options.plain[2:4]
    missing = [a for a in options.architectures if not (options.data / "weights" / WEIGHTS[a]).is_file()]
    architectures = [a for a in options.architectures if a not in missing]
    sets = [d for d in options.datasets if (options.data / d / "train.tar").is_file()]
    if not architectures or not sets:
        bench.skip(f"no weights and pictures at {options.data}; give their folder with --data")
        return bench.finish()
    torch.set_num_threads(1)
    table = Table(options.runs)
    rates = {"rms": options.rms, "plain": options.plain}
    size = (options.steps, options.batch, options.size)
    tables: dict[str, Scores] = {kind: {} for kind in rates}
    frozen, runs = {}, []
    for seed in options.seeds:
        for a in architectures:
            for d in sets:
                nothing = Try(a, d, "frozen", 0.0, 0, *size)
                frozen[f"{a}, {d}"] = table.get(nothing, lambda one: measure(one, options.data))
                for kind, grid in rates.items():
                    tries = [Try(a, d, kind, rate, seed, *size) for rate in grid]
                    results = [table.get(one, lambda one: measure(one, options.data)) for one in tries]
                    runs += [{**asdict(t), **r} for t, r in zip(tries, results, strict=True)]
                    tables[kind][a, d, seed] = {
                        t.rate: r["score"] for t, r in zip(tries, results, strict=True)
                    }
    bench.figure("not_measured", dict.fromkeys(missing, "no weights at hand"))
    bench.figure("frozen", frozen)
    compare(bench, tables, options.steps)
    bench.figure("runs", runs)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
