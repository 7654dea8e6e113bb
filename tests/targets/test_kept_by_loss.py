"""A validation part where runs are trained towards numbers or label maps, and batches in micro-steps."""

import json
from pathlib import Path

import pytest
import torch

from selfmask_dist.data import Batch
from tests.support.targets import run_target, write_targets

KEEP = [
    "train.keep=best",
    "train.validation=0.2",
    "eval.knn_every=0.5",
    "train.ema=0.8",
    "train.accumulate=2",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_targets(tmp_path_factory.mktemp("targets"))


@pytest.mark.parametrize(
    ("target", "metric"), [("regression", "absolute_error"), ("dense", "pixel_accuracy")]
)
def test_the_state_of_the_lowest_loss_is_kept(
    tmp_path: Path, data: dict[str, str], target: str, metric: str
) -> None:
    settings = [
        f"objective.target={target}",
        "eval.probe=false",
        "optim.score_step=rms",
        "optim.score_lr=0.05",
    ]
    result = run_target(data, tmp_path / "a", *settings, *KEEP)
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["validation/loss"] for line in lines if "validation/loss" in line}
    assert result["kept"]["by"] == "loss"
    assert result["kept"]["value"] == min(losses.values())
    assert losses[result["kept_step"]] == min(losses.values())
    assert any(f"validation/{metric}" in line for line in lines)


def test_targets_are_split_with_their_rows() -> None:
    batch = Batch(
        views=(torch.zeros(4, 3, 2, 2),),
        labels=torch.arange(4),
        weights=torch.ones(4),
        ids=torch.arange(4),
        global_count=4,
        targets=torch.arange(8.0).view(4, 2),
    )
    first, second = batch.split(2)
    assert first.targets is not None
    assert second.targets is not None
    assert torch.equal(torch.cat([first.targets, second.targets]), torch.arange(8.0).view(4, 2))
    assert len(first.targets) == len(first.ids) == 2
