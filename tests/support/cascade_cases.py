"""The smallest cascade: noisy pictures of four colours, a two-block ViT on 16 pixels, two experts."""

from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.image_folder import convert_image_folder

COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200), "grey": (120, 120, 120)}


def write_shards(folder: Path, *, train: int = 96, test: int = 32, noise: float = 40) -> Path:
    rng = np.random.default_rng(0)
    for split, number in (("train", train), ("test", test)):
        for index in range(number):
            # two large classes and two small ones, so that clusters differ in size
            name = list(COLOURS)[(0, 0, 0, 1, 1, 2, 3, 0)[index % 8]]
            pixels = np.clip(rng.normal(COLOURS[name], noise, size=(16, 16, 3)), 0, 255).astype(np.uint8)
            path = folder / "src" / split / name / f"{index:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    convert_image_folder(folder / "src", folder / "shards")
    return folder / "shards"


def settings(shards: Path, out: Path, *more: str) -> list[str]:
    """Overrides of a cascade that takes seconds."""
    return [
        "method=cascade",
        f"data.train={shards / 'train'}",
        f"data.test={shards / 'test'}",
        f"run.dir={out}",
        "run.progress=false",
        "run.log_every=4",
        "backbone.pretrained=false",
        "backbone.kwargs={patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}",
        "backbone.image_size=16",
        "backbone.crop_pct=1.0",
        "objective.name=swav",
        "crops.local_count=1",
        "crops.local_size=8",
        "crops.blur=0",
        "swav.prototypes=8",
        "swav.dim=8",
        "swav.queue_length=16",
        "swav.queue_start_epoch=1",
        "cascade.clusters=[2]",
        "cascade.components=4",
        "cascade.restarts=2",
        "train.epochs=3",
        "train.global_batch_size=16",
        "optim.score_lr=20",
        "eval.knn_k=[5]",
        "eval.knn_every=0",
        "eval.batch_size=16",
        "engine.workers=0",
        "engine.device=cpu",
        "engine.threads=1",
        *more,
    ]
