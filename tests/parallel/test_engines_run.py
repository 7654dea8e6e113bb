"""Whole runs on sharded engines leave the files that one process leaves."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from selfmask_dist.config import load_config
from selfmask_dist.training.build import build_backbone
from tests.support.distributed import run_distributed
from tests.training.test_run import _run_rank, losses_of, metrics_of, run_here, settings, shards

__all__ = ["shards"]  # the fixture


@pytest.mark.distributed
def test_sharded_runs_equal_one_process(shards: Path, tmp_path: Path) -> None:
    more = ("train.epochs=1", "eval.knn_every=0.5", "eval.frozen_baseline=true", "optim.score_lr=50")
    common = settings(shards, tmp_path, *more)
    encoder = build_backbone(load_config(None, common)).encoder
    save_file(encoder.state_dict(), tmp_path / "weights.safetensors")  # for fsdp to leave them in
    common.append(f"backbone.weights={tmp_path / 'weights.safetensors'}")
    whole = run_here([*common, "run.name=whole"])
    expected = json.loads((whole / "result.json").read_text())
    names = ("fsdp", "bits", "deepspeed")
    for name in names:  # new processes for each: one store serves one process group
        keys = [f"run.name={name}", f"engine.name={name}", "engine.zero_stage=3"]
        run_distributed(_run_rank, 2, [*common, *keys], backend="", timeout=240)
        assert losses_of(tmp_path / name) == pytest.approx(losses_of(whole), rel=1e-4)
        assert (tmp_path / name / "final.mask").stat().st_size > 0
        heads = [load_file(tmp_path / run / "head.safetensors") for run in ("whole", name)]
        for key, tensor in heads[0].items():  # of ZeRO-3 too, which keeps a head in pieces
            torch.testing.assert_close(heads[1][key], tensor, rtol=1e-3, atol=1e-5, msg=key)
        result = json.loads((tmp_path / name / "result.json").read_text())
        assert (result["fingerprint"], result["frozen"]) == (expected["fingerprint"], expected["frozen"])


@pytest.mark.distributed
def test_finetuning_on_shards_equals_one_process(shards: Path, tmp_path: Path) -> None:
    common = settings(shards, tmp_path, "train.epochs=1", "method=finetune")
    whole = run_here([*common, "run.name=whole"])
    run_distributed(_run_rank, 2, [*common, "run.name=fsdp", "engine.name=fsdp"], backend="", timeout=240)
    assert losses_of(tmp_path / "fsdp") == pytest.approx(losses_of(whole), rel=1e-4)
    sizes = [(folder / "encoder.safetensors").stat().st_size for folder in (tmp_path / "fsdp", whole)]
    assert sizes[0] == sizes[1]


@pytest.mark.distributed
def test_a_head_goes_first_on_shards_too(shards: Path, tmp_path: Path) -> None:
    """An epoch in which masks wait, half of one in which they do not: as one process has it."""
    common = settings(shards, tmp_path, "train.epochs=1.5", "optim.head_first_epochs=1", "optim.score_lr=50")
    whole = run_here([*common, "run.name=whole"])
    for name in ("fsdp", "bits"):
        keys = [f"run.name={name}", f"engine.name={name}"]
        run_distributed(_run_rank, 2, [*common, *keys], backend="", timeout=240)
        assert losses_of(tmp_path / name) == pytest.approx(losses_of(whole), rel=1e-4)
        flips = [[line["mask/flips"] for line in metrics_of(folder)] for folder in (tmp_path / name, whole)]
        assert flips[0] == flips[1]
        assert flips[0][:4] == [0, 0, 0, 0]
        assert sum(flips[0]) > 0
