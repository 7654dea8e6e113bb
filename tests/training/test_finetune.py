"""Baselines that train weights: which ones, AdamW's state, low-rank additions, and files of what changed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from selfmask_dist.config import Config, ConfigError, load_config
from selfmask_dist.config.sections import EngineConfig
from selfmask_dist.masking import attach
from selfmask_dist.parallel import World, build_engine
from selfmask_dist.training.build import build_backbone
from selfmask_dist.training.finetune import add_lora, choose_weights, load_changed, save_changed
from tests.support.distributed import run_distributed
from tests.support.engine_cases import Step, batch_of, world_here
from tests.support.models import make
from tests.support.resuming import check_resumed_equals_whole, last_state, losses_of, train
from tests.support.tiny_run import write_config, write_tiny_data

QUIET = {"eval": {"final": False}, "optim": {"weight_lr": 0.01, "head_lr": 0.01}}


@pytest.fixture(scope="module")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_tiny_data(tmp_path_factory.mktemp("data"))


# ---- which weights


def test_each_baseline_trains_what_its_paper_says() -> None:
    vit, _ = make("timm_vit")
    names = [name for name, _ in vit.named_parameters()]
    assert choose_weights(vit, "all") == names
    bias = choose_weights(vit, "bias")
    assert {"blocks.0.attn.qkv.bias", "norm.bias", "patch_embed.proj.bias"} <= set(bias)
    assert all(name.endswith("bias") for name in bias)
    assert len(bias) == sum(name.endswith("bias") for name in names)
    norm = choose_weights(vit, "norm")
    assert len(norm) == 2 * (2 * 2 + 1), "gain and bias of two layers a block, and of the last one"
    frozen = choose_weights(vit, "all", freeze=["embedding"])
    assert set(names) - set(frozen) == {"patch_embed.proj.weight", "patch_embed.proj.bias"}
    conv, _ = make("conv")
    assert choose_weights(conv, "bias") == ["bn1.bias", "downsample.1.bias", "bn2.bias"]
    assert set(dict(conv.named_parameters())) - set(choose_weights(conv, "all", freeze=["embedding"])) == {
        "conv1.weight",
        "bn1.weight",
        "bn1.bias",
    }
    tower, _ = make("open_clip")
    assert {"conv1.weight", "ln_pre.weight", "ln_pre.bias"} == set(dict(tower.named_parameters())) - set(
        choose_weights(tower, "all", freeze=["embedding"])
    )
    assert "transformer.resblocks.0.attn.in_proj_bias" in choose_weights(tower, "bias")


def test_what_trains_nothing_is_refused() -> None:
    conv, _ = make("conv")
    with pytest.raises(
        ValueError, match=r"finetune.freeze 'blocks.\*' matches no parameter; the first are conv1"
    ):
        choose_weights(conv, "all", freeze=["blocks.*"])
    with pytest.raises(ValueError, match="leaves nothing"):
        choose_weights(conv, "norm", freeze=["*"])
    with pytest.raises(ValueError, match="finds nothing to train"):
        choose_weights(nn.Linear(2, 2), "norm")


# ---- low-rank additions


@pytest.mark.parametrize(
    ("family", "targets", "expected"),
    [
        ("timm_vit", ["auto"], ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]),
        ("conv", ["auto"], ["conv1", "conv2", "downsample.0"]),
        ("open_clip", ["*mlp.c_fc"], [f"transformer.resblocks.{i}.mlp.c_fc" for i in range(2)]),
    ],
)
def test_lora_adds_a_low_rank_matrix_and_starts_at_the_pretrained_network(
    family: str, targets: list[str], expected: list[str]
) -> None:
    model, _ = make(family)
    model.eval()
    plain, _ = make(family)
    plain.eval()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    state = torch.get_rng_state()
    assert add_lora(model, rank=2, alpha=6.0, targets=targets, seed=1) == expected
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left as it was"
    assert torch.allclose(model(images), plain(images), atol=1e-12)
    trained = choose_weights(model, "lora")
    assert len(trained) == 2 * len(expected)
    own = dict(model.named_parameters())
    for name in trained:
        own[name].data.copy_(torch.randn(own[name].shape, dtype=torch.float64))
    weights = dict(plain.named_parameters())
    for name in expected:  # the formula, put into the plain network
        a, b = (own[f"{name}.lora_{letter}.default.weight"].detach() for letter in "AB")
        addition = (b.flatten(1) @ a.flatten(1)).view_as(weights[f"{name}.weight"])
        weights[f"{name}.weight"].data.add_(6.0 / 2 * addition)
    assert torch.allclose(model(images), plain(images), atol=1e-10)


def test_lora_takes_q_and_v_where_they_are_modules() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.proj = (nn.Linear(4, 4) for _ in range(4))

    model = nn.ModuleDict({"attn": Attention()})
    assert add_lora(model, rank=1, alpha=1.0) == ["attn.q", "attn.v"]


def test_lora_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tower, _ = make("open_clip")
    with pytest.raises(ValueError, match=r"auto does not fit nn.MultiheadAttention.*mlp.c_fc"):
        add_lora(tower, rank=2, alpha=2.0)
    with pytest.raises(ValueError, match=r"'\*out_proj' matches no linear or convolutional module"):
        add_lora(tower, rank=2, alpha=2.0, targets=["*out_proj"])
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ValueError, match=r"needs peft .*pip install 'selfmask_dist\[lora\]'"):
        add_lora(make("conv")[0], rank=2, alpha=2.0)


def test_a_file_of_another_network_is_refused(tmp_path: Path) -> None:
    vit, _ = make("timm_vit")
    save_changed({"norm.bias": vit.get_parameter("norm.bias")}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"is of another network: norm.bias do not fit"):
        load_changed(make("conv")[0], tmp_path / "a.safetensors")


# ---- whole runs

KINDS = {
    "all": ["finetune.train=all", "finetune.freeze=[embedding]"],
    "bias": ["finetune.train=bias"],
    "norm": ["finetune.train=norm", "optim.kind=adamw"],
    "lora": ["finetune.train=lora", "finetune.lora_rank=2", "optim.kind=adamw", "optim.weight_decay=0.01"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_saves_what_changed_and_no_more(tmp_path: Path, tiny_data: dict[str, str], kind: str) -> None:
    path = write_config(tmp_path / "tiny.yaml", tiny_data, method="finetune", **QUIET)
    result = train(path, ["run.name=a", "train.epochs=1", *KINDS[kind]])
    file = tmp_path / "a" / "finetuned.safetensors"
    saved = load_file(file)
    fresh = build_backbone(load_config(tmp_path / "a" / "config.yaml")).encoder
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    assert set(load_changed(fresh, file)) == set(saved)
    assert result["weights"] == {
        "trained": sum(tensor.numel() for tensor in saved.values()),
        "file": "finetuned.safetensors",
        "bytes": file.stat().st_size,
    }
    assert result["stored_bytes"] == file.stat().st_size
    own = dict(fresh.named_parameters())
    for name, tensor in last_state(tmp_path / "a").items():
        if name.startswith("parameters/encoder."):
            assert torch.equal(own[name.removeprefix("parameters/encoder.")], tensor), name
    changed = {name for name, tensor in before.items() if name in own and not torch.equal(own[name], tensor)}
    if kind == "lora":
        assert not changed, "the network itself is as it was"
        assert all(saved[name].any() for name in saved if "lora_B" in name), "and its additions are not zero"
    else:
        assert changed == set(saved)
        assert "patch_embed.proj.weight" not in changed


@pytest.mark.parametrize("method", ["finetune", "mask"])
def test_adamw_goes_on_bit_for_bit(tmp_path: Path, tiny_data: dict[str, str], method: str) -> None:
    keys = [
        f"method={method}",
        "optim.kind=adamw",
        "optim.weight_lr=1e-3",
        "optim.score_lr=0.1",
        "run.name=a",
    ]
    path = write_config(tmp_path / "tiny.yaml", tiny_data, **QUIET)
    check_resumed_equals_whole(path, [*keys, "optim.weight_decay=0.1"], tmp_path / "a", step=3)
    state = last_state(tmp_path / "a")
    name = "encoder.blocks.0.attn.qkv.weight"
    assert state[f"second_moment/{name}"].shape == state[f"parameters/{name}"].shape
    assert state[f"num_updates/{name}"] == len(losses_of(tmp_path / "a"))
    with pytest.raises(ValueError, match=r"optim\.kind"):
        train(path, [*keys, "run.resume=true", "optim.kind=sgd"])


# ---- engines

WHAT = ("bias", "lora", "all", "mask")


def states_and_losses(kind: str, train_what: str, state: Any = None) -> tuple[Any, list[float]]:
    model, _ = make("timm_vit", dtype=torch.float64)
    if train_what == "lora":
        add_lora(model, rank=2, alpha=4.0)
    step = Step(model, 24, torch.float64, "frozen")
    world: World = world_here()
    blocks, config = ("blocks.0", "blocks.1"), EngineConfig.model_validate({"name": kind})
    engine = build_engine(step, encoder=model, blocks=blocks, world=world, config=config)
    groups: list[dict[str, Any]]
    if train_what == "mask":
        masks = engine.attach(model, attach, include="vit")
        groups = [{"params": list(masks.parameters()), "lr": 0.3}, {"params": list(step.head.parameters())}]
    else:
        weights = engine.free(model, choose_weights(model, train_what))  # type: ignore[arg-type]
        groups = [{"params": [*weights, *step.head.parameters()], "lr": 0.01, "weight_decay": 0.1}]
    engine.start(torch.optim.AdamW(groups, weight_decay=0.0))
    if state is not None:
        engine.load_state(state)
    losses = []
    for index in range(2 if state is None else 4, 4 if state is None else 6):
        metrics = engine.forward_backward(batch_of(index, world.rank, world.size, dtype=torch.float64))
        losses.append(world.sum(metrics["loss"].clone()).item())
        engine.step()
    return engine.state(), losses


def all_engines(states: dict[str, Any]) -> dict[tuple[str, str], Any]:
    found = {}
    for what in WHAT:
        for kind in ("ddp", "fsdp", "bits") if what == "mask" else ("ddp", "fsdp"):
            first, losses = states_and_losses(kind, what)
            _, more = states_and_losses(kind, what, states[what])
            found[what, kind] = (first, losses + more)
    return found


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
def test_adamw_and_parts_of_the_weights_train_alike_on_two_ranks_and_on_shards() -> None:
    alone = {what: states_and_losses("ddp", what) for what in WHAT}
    rest = {what: states_and_losses("ddp", what, state) for what, (state, _) in alone.items()}
    found = run_distributed(all_engines, 2, {what: state for what, (state, _) in alone.items()}, timeout=120)[
        0
    ]
    for (what, kind), (state, losses) in found.items():
        assert losses == pytest.approx(alone[what][1] + rest[what][1], rel=1e-9), (what, kind)
        for part in ("parameters", "momentum", "second_moment", "num_updates"):
            expected: dict[str, Tensor] = getattr(alone[what][0], part)
            assert set(getattr(state, part)) == set(expected), (what, kind, part)
            for name, tensor in expected.items():
                torch.testing.assert_close(getattr(state, part)[name], tensor, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["optim.kind=adamw", "engine.name=deepspeed"], "use engine.name=fsdp or optim.kind=sgd"),
        (["method=finetune", "finetune.train=lora", "engine.name=deepspeed"], "use engine.name=ddp or fsdp"),
        (["method=finetune", "finetune.train=lora", "finetune.freeze=[x]"], "leave finetune.freeze empty"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(overrides: list[str], complaint: str) -> None:
    assert Config().optim.kind == "sgd"
    with pytest.raises(ConfigError, match=complaint):
        load_config(None, overrides)
