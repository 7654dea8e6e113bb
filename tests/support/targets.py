"""The smallest data with targets of every kind: noisy pictures with a bright square, and tiny runs on them.

A picture's labels say which of its colours are strong, its number is the square's side, its map the square.
"""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from selfmask_dist.config import load_config
from selfmask_dist.data.build import build_index
from selfmask_dist.parallel import World
from selfmask_dist.runs.preempt import StopRequest
from selfmask_dist.training.run import run_in
from tests.support.tars import write_tar

CLASSES = ["red", "green", "blue"]
SIZE = 16


def sample(index: int, rng: np.random.Generator) -> tuple[bytes, dict[str, Any], bytes]:
    """One picture as PNG, its .json and its label map as PNG."""
    labels = [c for c in range(3) if (index >> c) & 1]
    pixels = rng.normal(70, 25, size=(SIZE, SIZE, 3))
    pixels[..., labels] += 90
    side = 3 + index % 10
    top, left = rng.integers(0, SIZE - side, 2)
    seg = np.zeros((SIZE, SIZE), dtype=np.uint8)
    seg[top : top + side, left : left + side] = 1
    pixels[seg == 1] = 255
    return (
        _png(np.clip(pixels, 0, 255).astype(np.uint8)),
        {"labels": labels, "value": float(side)},
        _png(seg),
    )


def write_targets(folder: Path, *, train: int = 40, test: int = 16) -> dict[str, str]:
    """Indexed tars of `train` and `test` pictures; returns the settings of the section data."""
    found = {}
    for split, number in (("train", train), ("test", test)):
        rng = np.random.default_rng(len(split))
        (folder / split).mkdir(parents=True)
        members: list[tuple[str, bytes]] = []
        for index in range(number):
            picture, about, seg = sample(index, rng)
            key = f"{index:03d}"
            members += [
                (f"{key}.json", json.dumps(about).encode()),
                (f"{key}.png", picture),
                (f"{key}.seg.png", seg),
            ]
        write_tar(folder / split / "a.tar", members)
        build_index(folder / split, classes=CLASSES)
        found[split] = str(folder / split)
    return found


def run_target(data: dict[str, str], out: Path, *settings: str) -> dict[str, Any]:
    """Run in this process and return `result.json`."""
    config = load_config(
        None,
        [
            "backbone.name=timm:vit_tiny_patch16_224",
            "backbone.pretrained=false",
            f"backbone.image_size={SIZE}",
            "backbone.crop_pct=1.0",
            "backbone.kwargs={patch_size: 4, embed_dim: 32, depth: 2, num_heads: 2}",
            *(f"data.{split}={path}" for split, path in data.items()),
            "data.crop_scale=[0.9, 1.0]",
            "train.epochs=2",
            "train.global_batch_size=20",
            "eval.knn_every=0",
            "engine.device=cpu",
            "engine.workers=0",
            "run.progress=false",
            "run.log_every=1",
            f"run.dir={out.parent}",
            f"run.name={out.name}",
            *settings,
        ],
    )
    return run_in(config, World(), StopRequest(), is_restart=False)


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
