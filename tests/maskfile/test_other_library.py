"""A mask that was trained on one library's model goes on another library's model of the same weights."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from selfmask_dist import apply_masks, attach
from selfmask_dist.backbones import fingerprint
from selfmask_dist.backbones.libraries.views import translations
from selfmask_dist.maskfile import MaskFileError, read_mask_file
from selfmask_dist.maskfile.fit import weights_of
from selfmask_dist.masking import marks
from tests.support import hugging_face

WIDTH: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
IMAGES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).mul(37).sin().view(2, 3, 32, 32)


def timm_model(name: str, **options: Any) -> nn.Module:
    return timm.create_model(name, **{**WIDTH, "img_size": 32, "patch_size": 8, **options})


def transformers_model(name: str, **entries: Any) -> nn.Module:
    kind, own = hugging_face.CONFIGS[name]
    return transformers.AutoModel.from_config(getattr(transformers, kind)(**{**own, **entries}))


def openai_tower() -> nn.Module:
    return VisionTransformer(
        image_size=32, patch_size=8, width=32, layers=2, heads=2, mlp_ratio=2.0, output_dim=16
    )


def dinov3() -> nn.Module:
    return timm_model("vit_small_patch16_dinov3_qkvb", mlp_ratio=2.0, num_reg_tokens=2)


MODELS: dict[str, Any] = {
    "dinov2": (
        lambda: timm_model("vit_small_patch14_dinov2", mlp_ratio=2.0),
        lambda: transformers_model("dinov2"),
    ),
    "dinov2 swiglu": (
        lambda: timm_model("vit_giant_patch14_dinov2", mlp_ratio=3.0),
        lambda: transformers_model("dinov2_swiglu"),
    ),
    "vit": (
        lambda: timm_model("vit_tiny_patch16_224", mlp_ratio=2.0),
        lambda: transformers_model("vit", layer_norm_eps=1e-6),
    ),
    "dinov3": (dinov3, lambda: transformers_model("dinov3", use_gated_mlp=False)),
    "clip": (openai_tower, lambda: transformers_model("clip_vision", hidden_act="gelu", projection_dim=16)),
}

QUICK = ("dinov2", "dinov2 swiglu")


def embed(model: Any) -> Tensor:
    """Class token after the last normalisation, before a projection."""
    if isinstance(model, VisionTransformer):
        return model.ln_post(model.transformer(model._embeds(IMAGES)))[:, 0]
    if isinstance(model, transformers.PreTrainedModel):
        output = model(IMAGES)
        is_clip = isinstance(model, transformers.CLIPVisionModel)
        return output.pooler_output if is_clip else output.last_hidden_state[:, 0]
    return model.forward_features(IMAGES)[:, 0]


def pair(kind: str) -> tuple[nn.Module, nn.Module]:
    """The same random weights in two libraries."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first, second = (build().eval() for build in MODELS[kind])
        for parameter in first.parameters():
            nn.init.normal_(parameter, std=0.1)
    state, own = second.state_dict(), first.state_dict()
    known = [name for name in state if next(translations([name], own), None) is not None]
    (moved, *_) = translations(known, own)
    values = {name: value.view_as(state[name]) for name, value in moved.read(own).items()}
    by_hand = {
        "dinov3": {
            "embeddings.cls_token": "cls_token",
            "embeddings.register_tokens": "reg_token",
        },
        "clip": {
            "embeddings.class_embedding": "class_embedding",
            "embeddings.position_embedding.weight": "positional_embedding",
        },
    }.get(kind, {})
    values |= {name: own[source].view_as(state[name]) for name, source in by_hand.items()}
    left = {name for name in set(state) - set(values) if "pooler" not in name and "mask_token" not in name}
    assert not {name for name in left if not name.endswith("projection.weight")}, left
    second.load_state_dict(state | values)
    return first, second


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in MODELS]
)
def test_there_and_back(kind: str, tmp_path: Path) -> None:
    for source, target in (pair(kind), pair(kind)[::-1]):
        before = embed(source).detach()
        torch.testing.assert_close(embed(target), before, rtol=1e-5, atol=1e-5)
        masks = attach(source)
        optimizer = torch.optim.SGD(masks.parameters(), lr=1e4)
        masks.bind(optimizer)
        embed(source).square().sum().backward()
        optimizer.step()
        trained = embed(source).detach()
        assert not torch.allclose(trained, before, atol=1e-3)
        masks.save(tmp_path / "it.mask")
        weights = read_mask_file(tmp_path / "it.mask").masks["default"].weights_fingerprint
        names = [entry.name for entry in masks.entries]
        held = dict(target.named_parameters())
        assert fingerprint(next(translations(names, held)).read(held).items()) == weights
        apply_masks(target, tmp_path / "it.mask")
        torch.testing.assert_close(embed(target), trained, rtol=1e-5, atol=1e-5)
        with pytest.raises(MaskFileError, match="wrong backbone"):  # not on top of itself
            apply_masks(target, tmp_path / "it.mask")
        assert "theta of mask 'default'" in next(iter(marks.left_over(target).values()))


def test_what_is_of_no_known_library_is_refused(tmp_path: Path) -> None:
    source, target = pair("dinov2")
    masks = attach(source)
    masks.save(tmp_path / "it.mask")
    other = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2)])})
    with pytest.raises(MaskFileError, match=r"whose names are not known as those of the mask's"):
        apply_masks(other, tmp_path / "it.mask")
    with torch.no_grad():
        target.get_parameter("encoder.layer.1.attention.k_proj.weight")[0, 0] += 1
    with pytest.raises(MaskFileError, match=r"names are timm's, .* model of transformers .*: wrong backbone"):
        apply_masks(target, tmp_path / "it.mask")


def test_bits_that_are_coded_by_weights_are_read_with_the_other_librarys(tmp_path: Path) -> None:
    source, target = pair("dinov2")
    masks = attach(source)
    masks.save(tmp_path / "it.mask", against_weights=True)
    own, other = (
        read_mask_file(tmp_path / "it.mask", weights=weights_of(m)).masks["default"] for m in (source, target)
    )
    assert all(torch.equal(bits, other.bits[name]) for name, bits in own.bits.items())
    apply_masks(target, tmp_path / "it.mask")
