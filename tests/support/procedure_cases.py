"""Scanned digits as rows of pixels, small networks on them, a few lines to train one; procedures as runs."""

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from selfmask_dist.cli.train import run
from selfmask_dist.config import load_config
from tests.support.tiny_run import write_config

RESNET = {
    "name": "timm:resnet18",
    "pretrained": False,
    "image_size": 16,
    "crop_pct": 1.0,
    "kwargs": {"channels": [8, 8, 8, 16], "stem_width": 8},
}


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train pixels (n, 64) in 0..1 and labels, test pixels and labels: every fifth digit is for testing."""
    bunch = load_digits()
    pixels, labels = torch.from_numpy(bunch.data / 16).float(), torch.from_numpy(bunch.target)
    is_test = torch.arange(len(labels)) % 5 == 0
    return pixels[~is_test], labels[~is_test], pixels[is_test], labels[is_test]


def mlp(*widths: int, seed: int = 0, norm: bool = False, bias: bool = True) -> nn.Sequential:
    """Linear layers with rectifiers between them; a name is its place in the Sequential."""
    layers: list[nn.Module] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for index, (before, after) in enumerate(itertools.pairwise(widths)):
            layers.append(nn.Linear(before, after, bias=bias))
            if index < len(widths) - 2:
                layers += [nn.BatchNorm1d(after), nn.ReLU()] if norm else [nn.ReLU()]
    return nn.Sequential(*layers)


def train(
    model: nn.Module,
    parameters: Iterable[Tensor],
    pixels: Tensor,
    labels: Tensor,
    *,
    steps: int,
    lr: float,
    seed: int = 0,
    bind: Callable[[torch.optim.Optimizer], None] = lambda optimizer: None,
    weight_decay: float = 0.0,
) -> None:
    """Cross-entropy by SGD with momentum, 64 rows a step, cosine to zero."""
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=weight_decay)
    bind(optimizer)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(pixels), (64,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(pixels[rows]), labels[rows]).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, pixels: Tensor, labels: Tensor) -> float:
    return float((model(pixels).argmax(dim=1) == labels).double().mean())


def packed_theta(weights: dict[str, Tensor], owners: dict[str, Tensor], task: int) -> dict[str, Tensor]:
    """PackNet's theta_t = W * 1[1 <= owner <= t], by name."""
    return {name: weights[name] * ((owner >= 1) & (owner <= task)) for name, owner in owners.items()}


def start(folder: Path, data: dict[str, str], name: str, **sections: Any) -> tuple[dict[str, Any], Path]:
    """Run a procedure on the smallest settings, or go on with it; its result and its folder."""
    sections = {"train": {"epochs": 1}, "objective": {"head_norm": "l2"}, **sections}
    path = write_config(folder / f"{name}.yaml", data, **sections)
    is_there = (folder / name / "config.yaml").exists()
    result = run(load_config(path, [f"run.name={name}", f"run.resume={str(is_there).lower()}"]))
    return result, folder / name
