"""Weights, buffers and states under masks: what is given back, what is saved, what is not taken on trust."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision  # type: ignore[import-untyped]
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from selfmask_dist import Masks, apply_masks, attach
from selfmask_dist.masking import PartlyMaskedWarning, build_family
from tests.support.models import conv_net, make


def train(model: nn.Module, masks: Masks, *, steps: int = 3, lr: float = 100.0) -> None:
    optimizer = torch.optim.SGD(masks.parameters(), lr=lr)
    masks.bind(optimizer)
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        optimizer.zero_grad()
        out = model(torch.randn(4, 3, 16, 16, generator=generator, dtype=next(model.parameters()).dtype))
        nn.functional.cross_entropy(out[:, :3], torch.arange(4) % 3).backward()
        optimizer.step()


def same(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


# ---- state beside theta


class OwnStatistics(nn.Module):
    """Normalises by running statistics, and its name does not say so."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(16))
        self.scale = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.running_mean.lerp_(x.detach().mean(0), 0.1)  # type: ignore[operator]
        return self.scale * (x - self.running_mean)  # type: ignore[operator]


def with_own_statistics() -> nn.Module:
    return nn.Sequential(conv_net(), OwnStatistics())


@pytest.mark.parametrize("build", [conv_net, with_own_statistics])
@pytest.mark.parametrize("family", ["threshold", "joint"])
def test_detach_gives_buffers_back_and_a_second_task_is_right(
    build: Callable[[], nn.Module], family: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = build()
    pretrained = copy.deepcopy(model)
    first = attach(model, include="resnet", family=family)
    train(model.train(), first)
    assert not same(model, pretrained)
    first.detach()
    assert same(model, pretrained)

    second = attach(model, include="resnet")
    train(model.train(), second)
    second.save(tmp_path / "2.mask")
    applied = copy.deepcopy(pretrained)
    apply_masks(applied, tmp_path / "2.mask")
    images = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(applied.eval()(images), model.eval()(images), rtol=0, atol=0)


def test_buffers_come_back_with_the_last_of_several_masks() -> None:
    model = conv_net()
    pretrained = copy.deepcopy(model)
    first = attach(model, include="conv1.weight")
    train(model.train(), first)
    second = attach(model, include="conv2.weight")
    assert set(second.moved_statistics()) == set(first.moved_statistics()) != set()
    first.detach()
    assert second.moved_statistics(), "the second masks are trained on these statistics"
    second.detach()
    assert same(model, pretrained)


# ---- states


FAMILIES = {
    "cubic": {"keep_schedule": "cubic", "keep_steps": 6, "keep": 0.3},
    "linear": {"keep_schedule": "linear", "keep_steps": 9, "keep": 0.5, "keep_scope": "global"},
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("by", ["deepcopy", "torch.save", "safetensors", "clones"])
def test_a_state_holds_the_schedules_step(name: str, by: str, tmp_path: Path) -> None:
    family = lambda: build_family("topk", **FAMILIES[name])  # noqa: E731
    model, preset = make("timm_vit", dtype=torch.float32)
    again = copy.deepcopy(model)
    masks = attach(model, include=preset, family=family())
    train(model, masks, steps=4, lr=0.1)
    state = masks.state_dict()
    if by == "torch.save":
        torch.save(state, tmp_path / "a.pt")
        state = torch.load(tmp_path / "a.pt", weights_only=True)
    elif by == "safetensors":
        save_file(state, tmp_path / "a.safetensors")
        state = load_file(tmp_path / "a.safetensors")
    elif by == "clones":
        state = {key: value.cpu().clone() for key, value in state.items()}
    else:
        state = copy.deepcopy(state)
    taken_up = attach(again, include=preset, family=family())
    taken_up.load_state_dict(state)
    assert taken_up.step == masks.step == 4
    assert all(torch.equal(mask, taken_up.masks()[key]) for key, mask in masks.masks().items())
    assert all(torch.equal(theta, taken_up.thetas()[key]) for key, theta in masks.thetas().items())


def test_a_state_from_before_loads_as_it_did() -> None:
    model, preset = make("timm_vit")
    masks = attach(model, include=preset)
    train(model, masks)
    old = {name: scores for name, scores in masks.state_dict().items() if not name.startswith(":")}
    again = attach(make("timm_vit")[0], include=preset)
    again.load_state_dict(old)
    assert again.step == 0
    assert all(torch.equal(mask, again.masks()[key]) for key, mask in masks.masks().items())


@pytest.mark.parametrize("kind", ["conv", "timm_vit"])
def test_scores_are_not_loaded_onto_theta_or_other_weights(kind: str) -> None:
    model, preset = make(kind, dtype=torch.float32)
    masks = attach(model, include=preset)
    train(model, masks)
    saved = copy.deepcopy({"model": model.state_dict(), "masks": masks.state_dict()})

    right, _ = make(kind, dtype=torch.float32)
    again = attach(right, include=preset)
    right.load_state_dict(saved["model"])
    again.load_state_dict(saved["masks"])
    assert same(right, model)

    theta, _ = make(kind, dtype=torch.float32)
    theta.load_state_dict(saved["model"])
    over = attach(theta, include=preset)
    with pytest.raises(ValueError, match=r"they are a theta\. .*saved with masks on, and was loaded before"):
        over.load_state_dict(saved["masks"])

    other, _ = make(kind, seed=4, dtype=torch.float32)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="another backbone"):
        attach(other, include=preset, init=saved["masks"])
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    attach(other, include=preset)  # a refusal leaves nothing


class Holder(nn.Module):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone


WRAPPED: dict[str, Callable[[nn.Module], Any]] = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "parallel": nn.DataParallel,
    "held": Holder,
    "held and compiled": lambda model: Holder(torch.compile(model, backend="eager")),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("wrap", WRAPPED)
@pytest.mark.parametrize("is_saved_wrapped", [True, False])
def test_states_fit_with_a_wrapper_more_or_less(wrap: str, is_saved_wrapped: bool) -> None:
    model, preset = make("timm_vit")
    plain, _ = make("timm_vit")
    there = WRAPPED[wrap](model)
    masks, again = attach(there, include=preset), attach(plain, include=preset)
    train(model, masks)
    one, other = (masks, again) if is_saved_wrapped else (again, masks)
    if not is_saved_wrapped:
        train(plain, again)
        masks.load_state_dict({k: torch.ones_like(v) for k, v in masks.state_dict().items() if k[0] != ":"})
    other.load_state_dict(one.state_dict())
    assert list(again.masks().values()) != []
    assert all(map(torch.equal, masks.masks().values(), again.masks().values()))
    assert other.step == one.step == 3


def test_first_scores_do_not_depend_on_a_wrapper() -> None:
    model, preset = make("timm_vit")
    first = attach(copy.deepcopy(model), include=preset, init="kaiming_uniform").entries
    wrapped = attach(nn.DataParallel(model), include=preset, init="kaiming_uniform").entries
    assert all(torch.equal(a.scores, b.scores) for a, b in zip(first, wrapped, strict=True))


# ---- a parameter that is not the weight used


class Standardised(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        return nn.functional.conv2d(input, weight, self.bias, self.stride, self.padding)


class Cosine(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, nn.functional.normalize(self.weight, dim=1), self.bias)


def pruned_layer() -> nn.Module:
    layer = nn.Linear(4, 4)
    prune.random_unstructured(layer, "weight", amount=2)
    return layer


def old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(nn.Linear(4, 4))


DERIVED = {
    "standardised": lambda: Standardised(3, 4, 3),
    "cosine": lambda: Cosine(4, 4),
    "timm StdConv2d": lambda: timm.layers.StdConv2d(3, 4, 3),
    "timm StdConv2dSame": lambda: timm.layers.StdConv2dSame(3, 4, 3),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
    "old weight norm": old_weight_norm,
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(4, 4)),
    "pruned": pruned_layer,
}


@pytest.mark.parametrize("name", DERIVED)
def test_layers_that_derive_their_weight_are_refused_by_name(name: str) -> None:
    model = nn.ModuleDict({"plain": nn.Linear(4, 4), "layer": DERIVED[name]()})
    with pytest.raises(ValueError, match=r"not the weights that their layers compute with: layer\."):
        attach(model, include="*weight*")
    attach(model, include="*weight*", exclude="layer.*")


def test_layers_with_a_forward_of_their_own_and_their_own_weight_are_masked() -> None:
    model = nn.ModuleList([timm.layers.create_conv2d(3, 4, 3, stride=2, padding="same"), nn.Linear(4, 4)])
    assert type(model[0]) is not nn.Conv2d
    assert len(attach(model, include="*.weight").entries) == 2


# ---- what a preset covers


@pytest.mark.parametrize(
    ("build", "include"),
    [
        (lambda: torchvision.models.vit_b_16(), "resnet"),
        (lambda: timm.create_model("swin_tiny_patch4_window7_224", num_classes=0), "resnet"),
        (lambda: timm.create_model("resnet18", num_classes=0), "layer1.0.conv1.weight"),
    ],
)
def test_a_preset_that_masks_less_than_half_warns(build: Callable[[], nn.Module], include: str) -> None:
    with torch.device("meta"):
        model = build()
    if "." in include:  # a pattern of one's own is a choice
        masks = attach(model, include=include)
        assert masks.coverage().share < 0.1
        return
    with pytest.warns(PartlyMaskedWarning, match=r"weights masked; left out .*\.weight"):
        attach(model, include=include)


def test_what_is_covered_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="selfmask_dist")
    masks = attach(timm.create_model("resnet18", num_classes=10), include="resnet")
    line = "20 tensors, 11,166,912 weights, 100.0% of the matrices' weights masked"
    assert [line in message for message in caplog.messages] == [True]
    assert "100.0% of the matrices' weights masked" in masks.summary()
