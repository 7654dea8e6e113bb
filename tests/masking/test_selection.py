"""Selection by structure: the paper's architectures as before, all others by what their modules are."""

from collections.abc import Callable
from itertools import product

import open_clip
import pytest
import timm
import torch
import torchvision  # type: ignore[import-untyped]
from torch import nn
from torch.nn.utils import parametrizations

from selfmask_dist.masking import attach, select
from selfmask_dist.masking.selection import find_parts, measure_coverage, rule_of

VIT = {
    f"blocks.{block}.{layer}.{kind}"
    for block, layer, kind in product(
        range(12), ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"), ("weight", "bias")
    )
}
CLIP = {
    f"transformer.resblocks.{block}.{name}"
    for block, name in product(
        range(12),
        (
            "attn.in_proj_weight",
            "attn.in_proj_bias",
            *(
                f"{layer}.{kind}"
                for layer, kind in product(("attn.out_proj", "mlp.c_fc", "mlp.c_proj"), ("weight", "bias"))
            ),
        ),
    )
}
RESNET_50 = (
    {"conv1.weight"}
    | {f"layer{stage}.0.downsample.0.weight" for stage in range(1, 5)}
    | {
        f"layer{stage}.{block}.conv{conv}.weight"
        for stage, depth in enumerate((3, 4, 6, 3), 1)
        for block, conv in product(range(depth), (1, 2, 3))
    }
)


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


def timm_model(name: str) -> nn.Module:
    return on_meta(lambda: timm.create_model(name, num_classes=0))


@pytest.mark.parametrize(
    ("build", "rule", "expected"),
    [
        (lambda: timm.create_model("resnet50", num_classes=0), "resnet", RESNET_50),
        (lambda: torchvision.models.resnet50(), "resnet", RESNET_50),
        (lambda: timm.create_model("vit_base_patch16_224", num_classes=0), "vit", VIT),
        (lambda: timm.create_model("vit_small_patch14_dinov2", num_classes=0), "vit", VIT),
        (lambda: open_clip.create_model("ViT-B-32", load_weights=False, device="meta").visual, "vit", CLIP),
    ],
)
def test_the_papers_architectures_keep_its_rules(
    build: Callable[[], nn.Module], rule: str, expected: set[str]
) -> None:
    model = on_meta(build)
    assert rule_of(model) == rule
    assert set(select(model)) == expected


@pytest.mark.parametrize(
    "name",
    [
        "vit_small_plus_patch16_dinov3",  # SwiGLU
        "eva02_base_patch14_224",
        "caformer_s18",
        "maxvit_nano_rw_256",
        "convnext_atto",
        "swin_tiny_patch4_window7_224",
        "regnety_002",  # a stage of one block
        "mixer_s16_224",
    ],
)
def test_all_matrices_inside_the_blocks_are_masked(name: str) -> None:
    model = timm_model(name)
    names = select(model)
    assert rule_of(model) == "structure"
    coverage = measure_coverage(model, names)
    assert coverage.share > 0.95
    assert all(name.startswith(("stem", "patch_embed")) for name in coverage.left_out)
    owners = {name.rpartition(".")[0] for name in names}
    kinds = {type(model.get_submodule(owner)) for owner in owners}
    assert all(issubclass(kind, nn.Linear | nn.modules.conv._ConvNd) for kind in kinds), kinds


def test_what_multihead_attention_owns_is_masked_too() -> None:
    model = on_meta(torchvision.models.vit_b_16)
    names = select(model)
    assert "encoder.layers.encoder_layer_3.self_attention.in_proj_weight" in names
    assert "encoder.layers.encoder_layer_3.self_attention.in_proj_bias" in names
    assert measure_coverage(model, names).left_out == ("conv_proj.weight",)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4, bias=False)
        self.scale = nn.Parameter(torch.ones(4, 1))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 4)
        self.enter = nn.Conv2d(3, 4, 2)
        self.parts = nn.ModuleList([Residual(), Residual()])
        self.leave = nn.Linear(4, 2)
        self.fc = nn.Linear(2, 3)


def test_parts_follow_from_modules_and_not_from_names() -> None:
    model = Network()
    inside = ["parts.0.up.weight", "parts.0.up.bias", "parts.0.down.weight"]
    inside += [name.replace(".0.", ".1.") for name in inside]
    assert select(model) == select(model, "structure") == inside
    assert select(model, "matrices") == [name for name in inside if "bias" not in name]
    assert select(model, "stem") == ["enter.weight", "enter.bias"]
    assert select(model, ["structure", "pool"]) == [*inside, "leave.weight", "leave.bias"]
    assert [layer.name for layer in find_parts(model).head] == ["fc"]
    assert measure_coverage(model, select(model)).left_out == ("enter.weight", "leave.weight")


def test_models_without_blocks_are_masked_but_for_their_classifier() -> None:
    model = on_meta(torchvision.models.vgg11)
    assert measure_coverage(model, select(model)).share == 1
    assert not [name for name in select(model) if name.startswith("classifier")]


def test_derived_weights_are_refused_by_name_and_not_passed_over() -> None:
    model = Network()
    parametrizations.weight_norm(model.parts[1].get_submodule("up"))
    with pytest.raises(ValueError, match=r"layers compute with: parts\.1\.up\.parametrizations\.weight"):
        attach(model)
