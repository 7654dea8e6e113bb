"""Masks on models that are wrapped, converted, masked already or copied: found, or refused with the cause."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from selfmask_dist import MaskBank, apply_masks, attach
from selfmask_dist.maskfile import MaskFileError, read_mask_file, weights_of
from selfmask_dist.maskfile.api import save_masks
from tests.support.models import make


def save(model: nn.Module, path: Path, **options: Any) -> dict[str, Tensor]:
    """Save a mask that prunes the smallest weights of `model`, and return theta by plain names."""
    masks = attach(model, include=["*qkv*", "*mlp*"])
    sizes = {entry.name: entry.weight.float().abs() for entry in masks.entries}
    masks.load_state_dict({name: size - size.quantile(0.3) for name, size in sizes.items()})
    masks.save(path, **options)
    thetas = {
        name.replace("_orig_mod.", "").rpartition("blocks.")[2]: theta.clone()
        for name, theta in masks.thetas().items()
    }
    masks.detach()
    return thetas


def holds(model: nn.Module, thetas: dict[str, Tensor]) -> bool:
    found = dict(model.named_parameters())
    names = {name: key for key in found for name in thetas if key.endswith(f"blocks.{name}")}
    return len(names) == len(thetas) and all(
        torch.equal(found[names[name]], theta) for name, theta in thetas.items()
    )


def vit(**options: Any) -> nn.Module:
    return make("timm_vit", **{"dtype": torch.float32, **options})[0]


class Net(nn.Module):
    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def with_compiled_blocks(model: nn.Module) -> nn.Module:
    model.set_submodule("blocks.0", torch.compile(model.get_submodule("blocks.0"), backend="eager"))  # type: ignore[arg-type]
    return model


WRAPPED: dict[str, Callable[[nn.Module], Any]] = {
    "as it is": lambda model: model,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled blocks": with_compiled_blocks,
    "parallel": nn.DataParallel,
    "averaged": AveragedModel,
    "held": lambda model: Net(backbone=model, head=nn.Linear(24, 3)),
    "held by another name": lambda model: Net(encoder=Net(tower=model)),
    "held, parallel, compiled": lambda model: torch.compile(
        nn.DataParallel(Net(backbone=model)), backend="eager"
    ),
}


@pytest.mark.parametrize("there", WRAPPED)
@pytest.mark.parametrize("here", ["as it is", "compiled", "held", "held by another name"])
@pytest.mark.parametrize("against_weights", [False, True])
def test_a_wrapper_more_or_less(there: str, here: str, against_weights: bool, tmp_path: Path) -> None:
    thetas = save(WRAPPED[there](vit()), tmp_path / "x.mask", against_weights=against_weights)
    model = WRAPPED[here](vit())
    apply_masks(model, tmp_path / "x.mask")
    assert holds(model, thetas)


def test_files_have_plain_names(tmp_path: Path) -> None:
    save(torch.compile(nn.DataParallel(vit()), backend="eager"), tmp_path / "wrapped.mask")  # type: ignore[arg-type]
    save(vit(), tmp_path / "plain.mask")
    assert (tmp_path / "wrapped.mask").read_bytes() == (tmp_path / "plain.mask").read_bytes()


def test_two_places_are_an_error_and_one_module_twice_is_not(tmp_path: Path) -> None:
    thetas = save(vit(), tmp_path / "x.mask")
    two = Net(student=vit(), teacher=vit())
    with pytest.raises(MaskFileError, match=r"more than once, .*student\..*teacher\..*the one submodule"):
        apply_masks(two, tmp_path / "x.mask")
    apply_masks(two.get_submodule("teacher"), tmp_path / "x.mask")
    once = vit()
    shared = Net(first=once, second=once)
    apply_masks(shared, tmp_path / "x.mask")
    assert holds(once, thetas)
    with pytest.raises(MaskFileError, match="another architecture"):
        apply_masks(Net(backbone=nn.Linear(3, 3)), tmp_path / "x.mask")


# ---- half precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("how", ["apply", "bank"])
def test_the_same_weights_in_half_precision_take_the_mask(
    dtype: torch.dtype, how: str, tmp_path: Path
) -> None:
    thetas = save(vit(), tmp_path / "x.mask")
    model = vit().to(dtype)
    if how == "apply":
        apply_masks(model, tmp_path / "x.mask")
    else:
        bank = MaskBank(model)
        bank.add("x", tmp_path / "x.mask")
        bank.add("again", tmp_path / "x.mask")
        with bank.under("x"):
            pass
    for name, theta in thetas.items():
        found = model.get_parameter(f"blocks.{name}")
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), theta, rtol=0.02, atol=1e-6)
        assert torch.equal(found == 0, theta == 0)
    with pytest.raises(MaskFileError, match="wrong backbone"):
        apply_masks(vit(seed=8).to(dtype), tmp_path / "x.mask")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_mask_that_was_trained_in_half_precision_goes_on_the_full_weights(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    save(vit().to(dtype), tmp_path / "x.mask")
    model = vit()
    apply_masks(model, tmp_path / "x.mask")
    assert not torch.equal(
        model.get_parameter("blocks.0.mlp.fc1.weight"), vit().get_parameter("blocks.0.mlp.fc1.weight")
    )


def test_half_precision_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    save(vit(), tmp_path / "small.mask", against_weights=True)
    model = vit().half()
    with pytest.raises(MaskFileError, match=r"same backbone in another precision \(the model is float16"):
        apply_masks(model, tmp_path / "small.mask")
    masks = attach(vit(), include="vit")
    save_masks(masks, tmp_path / "run.mask")  # as runs write files: without the rounded fingerprints
    assert not next(iter(read_mask_file(tmp_path / "run.mask").masks.values())).rounded
    with pytest.raises(
        MaskFileError, match=r"The model is float16: rounded weights .*float32.*convert the model then"
    ):
        apply_masks(vit().half(), tmp_path / "run.mask")


# ---- masks on masks


def test_a_mask_is_not_applied_over_others(tmp_path: Path) -> None:
    save(vit(), tmp_path / "a.mask")
    model = vit()
    masks = attach(model, include="*attn.proj*")
    with pytest.raises(MaskFileError, match=r"carries masks in training \(blocks\.0\.attn\.proj\.weight"):
        apply_masks(model, tmp_path / "a.mask")
    with pytest.raises(MaskFileError, match="carries masks in training"):
        MaskBank(model).add("a", tmp_path / "a.mask")
    masks.detach()
    apply_masks(model, tmp_path / "a.mask")
    with pytest.raises(MaskFileError, match=r"theta of mask 'default' of .*a\.mask.*no mask applied yet"):
        apply_masks(model, tmp_path / "a.mask")


@pytest.mark.parametrize(
    "change", [copy.deepcopy, lambda model: model.half(), lambda model: Net(inner=model)]
)
def test_masks_are_not_attached_over_an_applied_one(change: Any, tmp_path: Path) -> None:
    save(vit(), tmp_path / "a.mask")
    model = vit()
    apply_masks(model, tmp_path / "a.mask")
    changed = change(model)
    with pytest.raises(ValueError, match=r"theta of mask 'default' of .*a\.mask"):
        attach(changed, include="*attn.proj*")


def test_pretrained_weights_loaded_again_take_masks_again(tmp_path: Path) -> None:
    thetas = save(vit(), tmp_path / "a.mask")
    model = vit()
    for _ in range(2):
        apply_masks(model, tmp_path / "a.mask")
        assert holds(model, thetas)
        model.load_state_dict(vit().state_dict())
    attach(model, include="vit")


def test_weights_of_a_wrapped_model_are_found() -> None:
    model = vit()
    find = weights_of(torch.compile(Net(backbone=model), backend="eager"))  # type: ignore[arg-type]
    assert find("blocks.0.mlp.fc1.weight") is model.get_parameter("blocks.0.mlp.fc1.weight")
    with pytest.raises(MaskFileError, match="another architecture"):
        find("blocks.7.mlp.fc1.weight")
