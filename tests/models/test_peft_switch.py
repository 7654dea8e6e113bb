"""Two masks and a LoRA on one frozen model, swapped; merged they are the exported masks, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from selfmask_dist import apply_masks
from tests.support.models import make

peft = pytest.importorskip("peft")  # the extra `lora`

from selfmask_dist.models.peft_masks import SelfMaskConfig, save_mask_file  # noqa: E402
from selfmask_dist.models.peft_switch import adapters_of, put_around, switch_to  # noqa: E402


class Features(nn.Module):
    """A model of transformers as images -> features."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.model(pixel_values=images).last_hidden_state[:, 0]
        return found


def timm_vit() -> nn.Module:
    return make("timm_vit", dtype=torch.float32)[0].eval()


def transformers_vit() -> nn.Module:
    from tests.support import hugging_face

    return Features(hugging_face.make("dinov2"))


CASES: dict[str, tuple[Any, list[str], int]] = {
    "timm": (timm_vit, ["attn.qkv", "mlp.fc1"], 16),
    "transformers": (transformers_vit, ["query", "value", "fc1"], 32),
}


@torch.no_grad()
def scatter(model: nn.Module, adapter: str, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if f".{adapter}" in name:
            shift = 0.5 if "scores" in name else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=draw) + shift)


def build(kind: str) -> tuple[Any, Any]:
    """The model under two masks and a LoRA, and the peft model of the masks within."""
    make_model, targets, _ = CASES[kind]
    masks = peft.get_peft_model(make_model(), SelfMaskConfig(target_modules=targets), adapter_name="pets")
    masks.add_adapter("birds", SelfMaskConfig(target_modules=targets))
    model: Any = put_around(masks, peft.LoraConfig(target_modules=targets, r=2), adapter_name="low")
    for seed, name in enumerate(("pets", "birds", "low")):
        scatter(model, name, seed)
    return model.eval(), masks


def alone(kind: str, images: Tensor, folder: Path, masks: Any) -> dict[str | None, Tensor]:
    """What each gives on a frozen model of its own: masks by their files, the LoRA by peft alone."""
    make_model, targets, _ = CASES[kind]
    expected: dict[str | None, Tensor] = {None: make_model()(images)}
    for name in ("pets", "birds"):
        save_mask_file(masks, folder / f"{name}.mask", adapter=name)
        own = make_model()
        apply_masks(own, folder / f"{name}.mask")
        expected[name] = own(images)
    lora = peft.get_peft_model(
        make_model(), peft.LoraConfig(target_modules=targets, r=2), adapter_name="low"
    ).eval()
    scatter(lora, "low", 2)
    expected["low"] = lora(images)
    return expected


@pytest.mark.parametrize("kind", CASES)
def test_two_masks_and_a_lora_are_swapped_on_one_model(kind: str, tmp_path: Path) -> None:
    if kind == "transformers":
        pytest.importorskip("transformers")
    size = CASES[kind][2]
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    model, masks = build(kind)
    assert sorted(adapters_of(model)) == ["birds", "low", "pets"]
    with torch.no_grad():
        expected = alone(kind, images, tmp_path, masks)
        assert not torch.allclose(expected["pets"], expected["birds"])
        assert not torch.allclose(expected["low"], expected[None])
        for name in ("low", "birds", None, "pets", "low", "pets", "birds"):
            switch_to(model, name)
            assert torch.equal(model(images), expected[name]), name


@pytest.mark.parametrize("kind", CASES)
def test_merged_a_mask_equals_the_export_bit_for_bit(kind: str, tmp_path: Path) -> None:
    if kind == "transformers":
        pytest.importorskip("transformers")
    make_model, targets, size = CASES[kind]
    model = peft.get_peft_model(make_model(), SelfMaskConfig(target_modules=targets))
    scatter(model, "default", 0)
    save_mask_file(model, tmp_path / "x.mask")
    exported = make_model()
    apply_masks(exported, tmp_path / "x.mask")
    merged = model.merge_and_unload()
    assert merged.state_dict().keys() == exported.state_dict().keys()
    for name, value in merged.state_dict().items():
        assert torch.equal(value, exported.state_dict()[name]), name
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    assert torch.equal(merged(images), exported(images))


def test_gradients_reach_the_one_that_is_on() -> None:
    model, _ = build("timm")
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for name in ("birds", "low", "pets"):
        switch_to(model, name)
        model.zero_grad()
        model(images).square().sum().backward()
        moved = {key for key, parameter in model.named_parameters() if parameter.grad is not None}
        assert moved
        assert all(f".{name}" in key for key in moved), name


def test_what_cannot_be_switched_is_said() -> None:
    model, masks = build("timm")
    with pytest.raises(ValueError, match=r"no adapter 'cats'; there are \['pets', 'birds', 'low'\]"):
        switch_to(model, "cats")
    switch_to(model, "pets")
    masks.merge_adapter()
    with pytest.raises(ValueError, match=r"are merged into the weights; call unmerge_adapter"):
        switch_to(model, "low")
