"""Runs that are cut back to an earlier checkpoint and resumed, to be held against whole ones."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfmask_dist.cli.train import run
from selfmask_dist.config import load_config
from selfmask_dist.runs.checkpoint import committed, read_checkpoint, step_of

KEEP = ("checkpoint.every_steps=1", "checkpoint.keep_last=100", "checkpoint.asynchronous=false")


def train(path: Path, overrides: list[str]) -> dict[str, Any]:
    return run(load_config(path, overrides))


def cut_back(folder: Path, step: int) -> None:
    """As if the run had been killed when `step` was the newest checkpoint."""
    for path in committed(folder / "checkpoints"):
        if step_of(path) > step:
            shutil.rmtree(path)
    for path in (folder / "result.json", *folder.glob("*.mask"), *folder.glob("*.safetensors")):
        path.unlink()


def last_state(folder: Path) -> dict[str, Tensor]:
    """All tensors of the newest checkpoint."""
    return read_checkpoint(committed(folder / "checkpoints")[0]).tensors


def losses_of(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def check_resumed_equals_whole(path: Path, overrides: list[str], folder: Path, *, step: int) -> None:
    """Train, cut back to `step`, resume, and compare every loss and every saved tensor bit for bit."""
    train(path, [*KEEP, *overrides])
    losses, state = losses_of(folder), last_state(folder)
    cut_back(folder, step)
    train(path, [*KEEP, *overrides, "run.resume=true"])
    assert losses_of(folder) == losses
    again = last_state(folder)
    assert set(again) == set(state)
    for name, tensor in state.items():
        assert torch.equal(again[name], tensor), name
