"""`backbone.pool` and dense features: each library's layout against the library's own words."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision  # type: ignore[import-untyped]
from torch import Tensor, nn

from selfmask_dist.backbones import load_backbone
from selfmask_dist.backbones.any_size import accept_sizes
from selfmask_dist.backbones.pooling import pool_of, use_pool
from selfmask_dist.backbones.tokens import dense_features, tokens_of
from tests.support import hugging_face

SMALL = {"depth": 2, "embed_dim": 32, "num_heads": 2}
VIT = "timm:vit_small_patch14_reg4_dinov2"  # a class token and four registers
CLIP: dict[str, Any] = {
    "vision_cfg": {"layers": 2, "width": 64, "head_width": 32},
    "text_cfg": {"layers": 1, "width": 32, "heads": 2},
}

SLOW = ("swin_t", "mobilenet_v3_small")


def images(height: int = 56, width: int = 56) -> Tensor:
    return torch.linspace(-1, 1, 2 * 3 * height * width).mul(37).sin().view(2, 3, height, width)


def load(name: str, pool: str = "model", **keys: Any) -> Any:
    keys = {"kwargs": SMALL, "image_size": 56, **keys}
    return load_backbone(name, pretrained=False, pool=pool, **keys)


@torch.no_grad()
def run(encoder: nn.Module, batch: Tensor) -> Tensor:
    return encoder(batch)


def test_a_vit_in_all_ways_with_one_fingerprint() -> None:
    found = {pool: load(VIT, pool) for pool in ("model", "class", "mean", "both")}
    out = {pool: run(one.encoder, images()) for pool, one in found.items()}
    own: Any = found["model"].encoder
    with torch.no_grad():
        tokens = own.forward_features(images())
    assert torch.equal(out["model"], own.forward_head(tokens))
    assert torch.equal(out["class"], out["model"])
    torch.testing.assert_close(out["mean"], tokens[:, 5:].mean(dim=1))
    assert torch.equal(out["both"], torch.cat((out["class"], out["mean"]), dim=1))
    specs = [one.spec for one in found.values()]
    assert len({spec.fingerprint for spec in specs}) == len({spec.blocks for spec in specs}) == 1
    assert [spec.dim for spec in specs] == [32, 32, 32, 64]
    assert list(found["both"].encoder.state_dict()) == list(own.state_dict())
    assert [pool_of(one.encoder) for one in found.values()] == list(found)
    for again in (copy.deepcopy(found["both"].encoder), pickle.loads(pickle.dumps(found["both"].encoder))):
        assert torch.equal(run(again, images()), out["both"])
        assert again.blocks is not found["both"].encoder.blocks


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("timm:beit_base_patch16_224", {"kwargs": SMALL, "image_size": 48}),  # a norm behind the mean
        ("timm:convnext_atto", {"kwargs": {"depths": [1, 1, 1, 1]}, "image_size": 64}),
        ("timm:swin_tiny_patch4_window7_224", {"kwargs": {"depths": [1, 1, 1, 1]}, "image_size": 56}),
        ("timm:resnet10t", {"kwargs": {}, "image_size": 64}),
    ],
)
def test_the_mean_is_that_of_models_that_pool_so(name: str, keys: dict[str, Any]) -> None:
    own, mean = load(name, **keys), load(name, "mean", **keys)
    batch = images(keys["image_size"], keys["image_size"])
    torch.testing.assert_close(run(mean.encoder, batch), run(own.encoder, batch), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name", [VIT, pytest.param("timm:hiera_tiny_224", marks=pytest.mark.slow), "timm:convnext_atto"]
)
@torch.no_grad()
def test_maps_are_as_timm_lays_them_out(name: str) -> None:
    keys = {"kwargs": SMALL} if name == VIT else {"kwargs": {}, "image_size": 64}
    size = 56 if name == VIT else 64
    encoder: Any = load(name, **keys).encoder
    batch = images(size, size)
    (expected,) = encoder.forward_intermediates(batch, indices=1, intermediates_only=True, norm=name == VIT)
    expected = expected.permute(0, 2, 3, 1)
    if name != VIT:
        expected = tokens_of(encoder, batch).norm(expected)
    torch.testing.assert_close(dense_features(encoder, batch), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        run(use_pool(encoder, "map", name=name), batch), expected, rtol=1e-5, atol=1e-5
    )


def test_images_that_are_no_squares() -> None:
    encoder = load(VIT).encoder
    accept_sizes(encoder, [56, 70], name=VIT)
    with torch.no_grad():
        assert dense_features(encoder, images(56, 84)).shape == (2, 4, 6, 32)
        assert dense_features(encoder, images(98, 28)).shape == (2, 7, 2, 32)
        encoder.forward_features = lambda batch: torch.zeros(len(batch), 5 + 12, 32)  # patches were dropped
        with pytest.raises(ValueError, match=r"gives 12 patches for images of 64 x 64, which are no grid"):
            dense_features(encoder, images(64, 64))


def test_clips_tower_before_and_after_its_projection() -> None:
    keys: dict[str, Any] = {"kwargs": CLIP, "image_size": 64}
    own = load("open_clip:ViT-B-32", **keys)
    tower: Any = own.encoder
    found = load("open_clip:ViT-B-32", "class", **keys)
    torch.testing.assert_close(run(found.encoder, images(64, 64)) @ tower.proj, run(tower, images(64, 64)))
    assert own.spec.fingerprint == found.spec.fingerprint
    tower.output_tokens = True
    with torch.no_grad():
        _, tokens = tower(images(64, 64))
        assert torch.equal(dense_features(tower, images(64, 64)), tokens.unflatten(1, (2, 2)))
    accept_sizes(found.encoder, [32, 64, 96], name="it")  # its class changes, its pooling stays
    assert pool_of(found.encoder) == "class"
    assert run(found.encoder, images(96, 96)).shape == (2, 64)
    with pytest.raises(ValueError, match="ViT-B-32 has no attention pooling"):
        load("open_clip:ViT-B-32", "attention", **keys)


def test_attention_pooling_is_the_models_own() -> None:
    keys: dict[str, Any] = {"kwargs": {**SMALL, "depth": 1}, "image_size": 32}
    siglip = "timm:vit_base_patch16_siglip_224"
    own, attention, mean = (load(siglip, pool, **keys) for pool in ("model", "attention", "mean"))
    batch = images(32, 32)
    assert torch.equal(run(own.encoder, batch), run(attention.encoder, batch))
    assert not torch.allclose(run(own.encoder, batch), run(mean.encoder, batch))
    for pool in ("class", "both"):
        with pytest.raises(ValueError, match=f"backbone.pool={pool}: .* has no class token; choose mean"):
            load(siglip, pool, **keys)
    with pytest.raises(ValueError, match=r"has no attention pooling .* choose mean, class or both"):
        load(VIT, "attention")
    with pytest.raises(ValueError, match="'max' is not one of"):
        load(VIT, "max")


@pytest.mark.parametrize("name", ["dinov2_registers", "dinov3", "convnext", "clip", "siglip2_vision"])
@torch.no_grad()
def test_transformers_models(name: str, tmp_path: Path) -> None:
    hugging_face.save(name, tmp_path)
    batch = images(32, 32)
    encoder: Any = load_backbone(f"hf:{tmp_path}").encoder
    mean = load_backbone(f"hf:{tmp_path}", pool="mean")
    own, out = encoder.model, run(mean.encoder, batch)
    if name in ("convnext", "siglip2_vision"):
        last = encoder._run(batch).last_hidden_state
        if name == "convnext":  # pools so by itself
            torch.testing.assert_close(out, run(encoder, batch), rtol=1e-5, atol=1e-5)
            assert dense_features(encoder, batch).shape == (2, 4, 4, 32)
        else:
            torch.testing.assert_close(out, last.mean(dim=1))
        with pytest.raises(ValueError, match="has no class token"):
            load_backbone(f"hf:{tmp_path}", pool="both")
        return
    last = own(batch).last_hidden_state
    prefix = 1 if name == "clip" else 3
    if name == "clip":
        last = own.vision_model.post_layernorm(last)
    assert torch.equal(dense_features(encoder, batch), last[:, prefix:].unflatten(1, (4, 4)))
    torch.testing.assert_close(out, last[:, prefix:].mean(dim=1))
    classes = run(load_backbone(f"hf:{tmp_path}", pool="class").encoder, batch)
    expected = own.visual_projection(classes) if name == "clip" else classes
    torch.testing.assert_close(expected, run(encoder, batch))


@pytest.mark.parametrize(
    "name",
    ["resnet18", "vit", "convnext_tiny", *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)],
)
@torch.no_grad()
def test_torchvisions_models(name: str) -> None:
    torch.manual_seed(0)
    side, vit = 64, {"num_layers": 1, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64}
    model: Any = (
        torchvision.models.VisionTransformer(side, 32, **vit)
        if name == "vit"
        else torchvision.models.get_model(name)
    ).eval()
    for last in ("heads", "head", "fc", "classifier"):
        if not hasattr(model, last):
            continue
        whole = getattr(model, last)
        if name == "convnext_tiny":
            whole[2] = nn.Identity()
        else:
            setattr(model, last, nn.Identity())
        break
    own = model(images(side, side))
    dense = dense_features(model, images(side, side))
    assert dense.shape[:3] == (2, side // 32, side // 32)
    pooled = use_pool(model, "class" if name == "vit" else "mean", name=name)(images(side, side))
    torch.testing.assert_close(pooled, own, rtol=1e-4, atol=1e-5)


def test_a_dense_encoder_and_models_of_nobody() -> None:
    backbone = load(VIT, dense=True)
    assert run(backbone.encoder, images()).shape == (2, 4, 4, backbone.spec.dim)
    assert backbone.spec.fingerprint == load(VIT).spec.fingerprint
    with pytest.raises(ValueError, match="pool=mean makes one vector"):
        load(VIT, "mean", dense=True)
    with pytest.raises(ValueError, match="patch tokens of a Sequential are not known"):
        dense_features(nn.Sequential(nn.Identity()), images())
