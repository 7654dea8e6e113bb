"""Any method of peft by one key: it trains, is saved as what it added, and comes back from its file."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import selfmask_dist
from selfmask_dist.config import load_config
from tests.models.cases import head_accuracy, pictures_of, train, write_hard_data
from tests.support.models import make

peft = pytest.importorskip("peft")  # the extra `lora`

from selfmask_dist.training.finetune import add_peft, load_changed, save_changed  # noqa: E402

METHODS: dict[str, dict[str, Any]] = {
    "VERA": {"r": 4},
    "LOHA": {"r": 2},
    "IA3": {"feedforward_modules": []},
    "LN_TUNING": {},
    "OFT": {"oft_block_size": 8},
    "HRA": {"r": 2},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_and_comes_back(method: str, tmp_path: Path) -> None:
    model, _ = make("timm_vit", dtype=torch.float32)
    settings = {"method": method, **METHODS[method]}
    before = torch.get_rng_state()
    names = add_peft(model, settings, seed=3)
    assert torch.equal(torch.get_rng_state(), before), "the global generator is left as it was"
    trained = {name: parameter for name, parameter in model.named_parameters() if name in names}
    assert names == list(trained)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model(images).square().sum().backward()
    with torch.no_grad():
        for parameter in trained.values():
            assert parameter.grad is not None
            parameter.add_(0.01)
    save_changed(trained, tmp_path / "finetuned.safetensors", peft={"settings": settings, "seed": 3})
    with safe_open(tmp_path / "finetuned.safetensors", "pt") as file:
        assert {*file.keys()} == set(names)
    fresh, _ = make("timm_vit", dtype=torch.float32)
    frozen = fresh(images)
    load_changed(fresh, tmp_path / "finetuned.safetensors")
    assert torch.equal(fresh.eval()(images), model.eval()(images))
    assert not torch.equal(fresh(images), frozen)


def test_a_whole_run(tmp_path: Path) -> None:
    data = write_hard_data(tmp_path)
    keys = ("method=finetune", "finetune.peft={method: vera, r: 16}", "optim.weight_lr=0.1")
    folder = train(tmp_path, data, "vera", *keys)
    loaded = selfmask_dist.load(folder)
    pictures = pictures_of(data)
    found = loaded.predict(pictures)
    right = sum(one.classes[0] == path.parent.name for one, path in zip(found, pictures, strict=True))
    assert right / len(pictures) == head_accuracy(folder)
    with safe_open(folder / "finetuned.safetensors", "pt") as file:
        assert {name.split(".")[-2] for name in file.keys()} == {"vera_lambda_b", "vera_lambda_d"}  # noqa: SIM118


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"method": "VERAS"}, "names the method 'VERAS'; peft .* has .*VERA"),
        ({"method": "PREFIX_TUNING"}, "names the method 'PREFIX_TUNING'"),
        ({"method": "ADALORA"}, "names the method 'ADALORA'"),
        ({"method": "VERA", "rank": 3}, "does not go onto this network: .*'rank'.*Its arguments are"),
        ({"method": "VERA", "target_modules": ["nothing"]}, "does not go onto this network"),
    ],
)
def test_what_cannot_be_is_said(settings: dict[str, Any], reason: str) -> None:
    model, _ = make("timm_vit", dtype=torch.float32)
    with pytest.raises(ValueError, match=reason):
        add_peft(model, settings, seed=0)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        (["finetune.train=bias"], "both say what is trained"),
        (["finetune.freeze=['*.bias']"], "leave finetune.freeze empty"),
        (["engine.name=fsdp"], "is not wired for engine.name=fsdp"),
        (["finetune.peft={r: 3}"], "names no method"),
    ],
)
def test_keys_that_contradict_it(keys: list[str], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        load_config(None, ["method=finetune", "finetune.peft={method: VERA, r: 4}", *keys])
