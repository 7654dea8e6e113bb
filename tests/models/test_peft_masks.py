"""Masks as a method of peft: the project's gradients and thetas, bit for bit, and peft's own life cycle."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from selfmask_dist import apply_masks, attach
from selfmask_dist.maskfile import MaskFileError
from tests.support.models import make

peft = pytest.importorskip("peft")  # the extra `lora`

from selfmask_dist.models.peft_masks import SelfMaskConfig, add_mask_file, save_mask_file  # noqa: E402

TARGETS = ["attn.qkv", "mlp.fc1"]
IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def frozen() -> nn.Module:
    return make("timm_vit", dtype=torch.float32)[0].eval()


def masked(seed: int) -> Any:
    """A peft model whose scores are made up."""
    model = peft.get_peft_model(frozen(), SelfMaskConfig(target_modules=TARGETS))
    scatter(model, "default", seed)
    return model


@torch.no_grad()
def scatter(model: Any, adapter: str, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith(f"selfmask_scores.{adapter}"):
            parameter.copy_(torch.randn(parameter.shape, generator=draw) + 0.5)


def test_it_starts_as_the_frozen_model_and_trains_scores_alone() -> None:
    model = peft.get_peft_model(frozen(), SelfMaskConfig(target_modules=TARGETS))
    assert torch.equal(model(IMAGES), frozen()(IMAGES))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 4
    assert all("selfmask_scores" in name for name in trained)


def test_gradients_are_those_of_attach() -> None:
    model = masked(1)
    model(IMAGES).square().sum().backward()
    own = frozen()
    masks = attach(own, include=["*attn.qkv.weight", "*mlp.fc1.weight"])
    optimizer = torch.optim.SGD(masks.parameters(), lr=1.0)
    masks.bind(optimizer)
    scores = {name: p for name, p in model.named_parameters() if "selfmask_scores" in name}
    with torch.no_grad():
        for entry, parameter in zip(masks.entries, masks.parameters(), strict=True):
            (match,) = [value for name, value in scores.items() if entry.name.removesuffix(".weight") in name]
            parameter.copy_(match)
    masks.rewrite()
    own(IMAGES).square().sum().backward()
    before = [parameter.detach().clone() for parameter in masks.parameters()]
    optimizer.step()
    for entry, parameter, old in zip(masks.entries, masks.parameters(), before, strict=True):
        (match,) = [value for name, value in scores.items() if entry.name.removesuffix(".weight") in name]
        assert match.grad is not None
        assert torch.allclose(old - parameter, match.grad, rtol=1e-4, atol=1e-6)


def test_merged_it_is_the_mask_file_bit_for_bit(tmp_path: Path) -> None:
    model = masked(1)
    save_mask_file(model, tmp_path / "x.mask", backbone="timm:x")
    expected = frozen()
    apply_masks(expected, tmp_path / "x.mask")
    assert torch.equal(model(IMAGES), expected(IMAGES))
    model.merge_adapter()
    assert torch.equal(model(IMAGES), expected(IMAGES))
    model.unmerge_adapter()
    assert torch.equal(model(IMAGES), expected(IMAGES))
    with model.disable_adapter():
        assert torch.equal(model(IMAGES), frozen()(IMAGES))
    merged: nn.Module = model.merge_and_unload()
    assert merged.state_dict().keys() == expected.state_dict().keys()
    for name, value in merged.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name]), name


def test_saved_and_loaded_by_peft(tmp_path: Path) -> None:
    model = masked(2)
    model.save_pretrained(tmp_path)
    loaded: Any = peft.PeftModel.from_pretrained(frozen(), tmp_path)
    assert torch.equal(loaded(IMAGES), model(IMAGES))
    assert loaded.peft_config["default"].peft_type == "SELFMASK"


def test_masks_are_swapped_and_come_from_files(tmp_path: Path) -> None:
    first, second = masked(3), masked(4)
    save_mask_file(second, tmp_path / "second.mask")
    add_mask_file(first, tmp_path / "second.mask", adapter="second")
    expected = {"default": first(IMAGES), "second": second(IMAGES)}
    for name in ("second", "default", "second"):
        first.set_adapter(name)
        assert torch.equal(first(IMAGES), expected[name])
    other = make("timm_vit", seed=1, dtype=torch.float32)[0]
    wrong = peft.get_peft_model(other, SelfMaskConfig(target_modules=TARGETS))
    with pytest.raises(MaskFileError, match="wrong backbone"):
        add_mask_file(wrong, tmp_path / "second.mask", adapter="second")
    first.set_adapter("default")
    first.delete_adapter("second")
    assert torch.equal(first(IMAGES), expected["default"])


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(ValueError, match=r"every weight would start switched off"):
        SelfMaskConfig(target_modules=TARGETS, init=-1.0)
    with pytest.raises(ValueError, match=r"a LayerNorm, which has no matrix of weights"):
        peft.get_peft_model(frozen(), SelfMaskConfig(target_modules=["norm1"]))
