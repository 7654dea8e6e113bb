"""Supervised runs whose accuracy is neither 0 nor 1, on pictures that are hard to tell apart."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_prep.image_folder import convert_image_folder
from selfmask_dist.cli.train import run
from selfmask_dist.config import load_config
from tests.support.tiny_run import result_of, write_config

CLASSES = ("ash", "birch, white", "oak")  # one with a comma, for CSV


def write_hard_data(folder: Path) -> dict[str, str]:
    """Shards of 48 and 40 pictures whose classes differ by less than their noise; returns `data`."""
    rng = np.random.default_rng(0)
    for split, number in (("train", 48), ("test", 40)):
        for index in range(number):
            mean = np.full(3, 118.0)
            mean[index % 3] += 9
            pixels = np.clip(rng.normal(mean, 70, size=(16, 16, 3)), 0, 255).astype(np.uint8)
            path = folder / "images" / split / CLASSES[index % 3] / f"{index:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    convert_image_folder(folder / "images", folder / "shards")
    return {split: str(folder / "shards" / split) for split in ("train", "test")}


def train(folder: Path, data: dict[str, str], name: str, *overrides: str) -> Path:
    """Train a run of that name in `folder` and return its folder."""
    config = write_config(folder / f"{name}.yaml", data, train={"epochs": 1, "global_batch_size": 12})
    run(load_config(config, [f"run.name={name}", "optim.score_lr=300", *overrides]))
    return folder / name


def pictures_of(data: dict[str, str]) -> list[Path]:
    """The test pictures, as files in folders that name their class."""
    folder = Path(data["test"]).parents[1] / "images" / "test"
    return sorted(folder.rglob("*.png"))


def head_accuracy(run_folder: Path) -> float:
    """The number that the run itself measured of its head."""
    value: Any = result_of(run_folder)["adapted"]["head"]
    return float(value)
