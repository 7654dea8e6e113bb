"""optim.score_step=rms in whole runs: killed and resumed, on shards, with a masked head."""

from pathlib import Path

import pytest

from tests.support.distributed import run_distributed
from tests.support.resuming import check_resumed_equals_whole
from tests.support.tiny_run import write_config
from tests.training.test_finetune import QUIET, tiny_data
from tests.training.test_run import _run_rank, losses_of, metrics_of, run_here, settings, shards

__all__ = ["shards", "tiny_data"]  # fixtures
RMS = ("optim.score_step=rms", "optim.score_lr=0.1")


def flips_of(directory: Path) -> list[float]:
    """The share of bits that each step flips."""
    return [line["mask/flips"] for line in metrics_of(directory)]


def test_a_run_goes_on_bit_for_bit(tmp_path: Path, tiny_data: dict[str, str]) -> None:
    path = write_config(tmp_path / "tiny.yaml", tiny_data, **QUIET)
    check_resumed_equals_whole(path, [*RMS, "optim.clip_norm=0.5", "run.name=a"], tmp_path / "a", step=3)


@pytest.mark.distributed
def test_two_processes_on_shards_equal_one(shards: Path, tmp_path: Path) -> None:
    common = settings(shards, tmp_path, *RMS, "train.epochs=1", "objective.head=masked")
    whole = run_here([*common, "run.name=whole"])
    assert sum(flips_of(whole)) > 0.005
    run_here([*common, "run.name=plain", "optim.score_step=plain"])
    assert sum(flips_of(tmp_path / "plain")) < 0.0005, "the same rate hardly moves plain scores"
    run_distributed(_run_rank, 2, [*common, "run.name=fsdp", "engine.name=fsdp"], backend="", timeout=240)
    assert losses_of(tmp_path / "fsdp") == pytest.approx(losses_of(whole), rel=1e-4)
