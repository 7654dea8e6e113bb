"""Runs with numbers held in bf16: stopped and resumed, and a mask file for the backbone's own weights."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from selfmask_dist import apply_masks
from selfmask_dist.config import load_config
from tests.support.resuming import KEEP, check_resumed_equals_whole, last_state, train
from tests.support.tiny_run import SETTINGS, write_config, write_tiny_data

HALF = ["engine.precision=bf16", "engine.weights=bf16", "eval.precision=bf16", "optim.score_lr=20"]
ALL = [*HALF, "engine.scores=bf16", "engine.momentum=bf16"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lean")
    settings = {**SETTINGS["backbone"], "weights": str(folder / "weights.safetensors")}
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=16, **settings["kwargs"])
    save_file(model.state_dict(), folder / "weights.safetensors")
    return write_config(folder / "config.yaml", write_tiny_data(folder), backbone=settings)


def test_killed_and_resumed_is_undisturbed(config: Path) -> None:
    folder = config.parent / "a"
    keys = [*ALL, "optim.score_step=rms", "optim.score_lr=0.2", "run.name=a", "eval.knn_every=1"]
    check_resumed_equals_whole(config, keys, folder, step=3)
    state = last_state(folder)
    scores = state["parameters/encoder.blocks.0.attn.qkv.weight"]
    assert scores.dtype == state["momentum/encoder.blocks.0.attn.qkv.weight"].dtype == torch.bfloat16
    assert len(scores.unique()) > 4
    assert state["parameters/objective.head.weight"].dtype == torch.float32


def test_layer_rates_and_bf16_momentum_in_float32_weights(config: Path) -> None:
    keys = ["engine.momentum=bf16", "optim.layer_decay=0.7", "train.max_steps=2", "eval.final=false"]
    train(config, [*KEEP, *keys, "run.name=c"])
    state = last_state(config.parent / "c")
    dtypes = {state[name].dtype for name in state if name.startswith("momentum/encoder.")}
    assert dtypes == {torch.bfloat16}
    assert {state[name].dtype for name in state if name.startswith("parameters/")} == {torch.float32}


def test_plain_steps_in_backward_resume_and_fit_the_file_of_weights(config: Path) -> None:
    folder = config.parent / "b"
    check_resumed_equals_whole(config, [*HALF, "run.name=b"], folder, step=5)
    kwargs = SETTINGS["backbone"]["kwargs"]
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=16, **kwargs)
    before = model.get_parameter("blocks.0.attn.qkv.weight").detach().clone()
    apply_masks(model, folder / "final.mask")  # it would refuse rounded weights
    after = model.get_parameter("blocks.0.attn.qkv.weight")
    assert after.dtype == torch.float32
    kept = after != 0
    assert 0.02 < kept.float().mean() < 1
    ratio = after[kept] / before[kept]
    assert torch.allclose(ratio, ratio[0].expand_as(ratio), rtol=1e-6)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        (["engine.weights=bf16"], "engine.precision=bf16"),
        ([*HALF, "engine.name=fsdp"], "engine.name=ddp"),
        ([*HALF, "mask.family=joint"], "mask.family=joint"),
        ([*HALF, "method=finetune"], "method=mask"),
        (["engine.scores=bf16"], "engine.weights=bf16"),
        (["engine.momentum=bf16", "optim.kind=adamw"], "optim.kind"),
        ([*ALL, "optim.clip_norm=1"], "optim.clip_norm"),
        ([*ALL, "objective.name=dino"], "objective.name=dino"),
        ([*ALL, "train.ema=0.9"], "train.ema"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(keys: list[str], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        load_config(None, ["backbone.name=timm:vit_base_patch32_224", *keys])
