"""Backbones of transformers from local folders: outputs, weights, preprocessing, masks; no hub."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from selfmask_dist import apply_masks, attach
from selfmask_dist.backbones import load_backbone
from selfmask_dist.backbones.any_size import accept_sizes
from selfmask_dist.backbones.hugging_face.images import from_entries
from tests.support import hugging_face

IMAGES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).sin().view(2, 3, 32, 32)


def own_embeddings(name: str, model: Any) -> Tensor:
    """What transformers itself says of these images."""
    with torch.no_grad():
        if name == "clip":
            return model.get_image_features(IMAGES).pooler_output
        if name == "siglip":
            return model.get_image_features(IMAGES).pooler_output
        if name == "siglip2_vision":
            processor = transformers.Siglip2ImageProcessor(
                patch_size=8, max_num_patches=16, do_rescale=False, do_normalize=False, do_resize=True
            )
            inputs = processor(images=list(IMAGES), return_tensors="pt", input_data_format="channels_first")
            return model(**inputs).pooler_output
        if name == "vit_mae":  # all patches, in whatever order
            model.config.mask_ratio = 0.0
            return model(IMAGES).last_hidden_state[:, 0]
        return model(IMAGES).pooler_output.flatten(1)


QUICK = ("dinov2", "clip")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in hugging_face.CONFIGS],
)
def test_embeddings_are_the_models_own_and_masks_come_back(name: str, tmp_path: Path) -> None:
    model = hugging_face.save(name, tmp_path)
    backbone = load_backbone(f"hf:{tmp_path}")
    encoder, spec = backbone.encoder, backbone.spec
    with torch.no_grad():
        before = encoder(IMAGES)
    torch.testing.assert_close(before, own_embeddings(name, model), rtol=1e-5, atol=1e-5)
    assert spec.dim == before.shape[1]
    assert len(spec.blocks) >= 2
    assert spec.preprocessing.image_size == 32
    assert spec.preprocessing.crop_mode == "squash"
    assert load_backbone(f"hf:{tmp_path}").spec.fingerprint == spec.fingerprint

    state = {key: value.clone() for key, value in encoder.state_dict().items()}
    masks = attach(encoder)
    places = ("embed", "model.head.", "pooler", "visual_projection")  # before and after the blocks
    assert all(any(place in key for place in places) for key in masks.coverage().left_out), masks.coverage()
    assert sum(parameter.numel() for parameter in encoder.parameters()) < 2 * masks.coverage().masked
    optimizer = torch.optim.SGD(masks.parameters(), lr=1e4)
    masks.bind(optimizer)
    encoder(IMAGES).square().sum().backward()
    optimizer.step()
    assert max(masks.sparsity().values()) > 0
    with torch.no_grad():
        masked = encoder(IMAGES)
    assert not torch.equal(masked, before)
    masks.save(tmp_path / "it.mask")
    masks.detach()
    assert all(torch.equal(value, state[key]) for key, value in encoder.state_dict().items())
    again = load_backbone(f"hf:{tmp_path}").encoder
    apply_masks(again, tmp_path / "it.mask")
    with torch.no_grad():
        assert torch.equal(again(IMAGES), masked)
    own: Any = model.vision_model if name == "siglip" else model  # else it could be the text tower's
    apply_masks(own, tmp_path / "it.mask")  # transformers' own model has the names without `model.`


def test_other_sizes_and_random_weights(tmp_path: Path) -> None:
    hugging_face.save("siglip_vision", tmp_path)
    encoder = load_backbone(f"hf:{tmp_path}", image_size=48).encoder
    assert encoder(torch.zeros(1, 3, 48, 48)).shape == (1, 32)
    accept_sizes(encoder, [16, 32], name="it")
    first = load_backbone(f"hf:{tmp_path}", pretrained=False, seed=1)
    assert (
        first.spec.fingerprint == load_backbone(f"hf:{tmp_path}", pretrained=False, seed=1).spec.fingerprint
    )
    assert first.spec.fingerprint != load_backbone(f"hf:{tmp_path}", pretrained=False).spec.fingerprint


def test_a_file_of_weights_and_entries_of_the_configuration(tmp_path: Path) -> None:
    hugging_face.save("dinov2", tmp_path)
    backbone = load_backbone(f"hf:{tmp_path}")
    save_file(backbone.encoder.state_dict(), tmp_path / "tuned.safetensors")  # names below `model.`
    again = load_backbone(f"hf:{tmp_path}", weights=tmp_path / "tuned.safetensors")
    assert again.spec.fingerprint == backbone.spec.fingerprint
    deeper = load_backbone(f"hf:{tmp_path}", pretrained=False, kwargs={"num_hidden_layers": 3})
    assert len(deeper.spec.blocks) == 3
    with pytest.raises(ValueError, match=r"weights do not fit .*encoder\.layer\.2"):
        load_backbone(f"hf:{tmp_path}", kwargs={"num_hidden_layers": 3})
    with pytest.raises(ValueError, match=r"weights do not fit .*encoder\.layer\.1.* not in the model"):
        load_backbone(f"hf:{tmp_path}", kwargs={"num_hidden_layers": 1})
    with pytest.raises(ValueError, match="has no depth"):
        load_backbone(f"hf:{tmp_path}", kwargs={"depth": 3})


def test_a_pooler_without_weights_is_left_out_and_a_classifier_too(tmp_path: Path) -> None:
    config = transformers.ViTConfig(**hugging_face.CONFIGS["vit"][1])
    model: nn.Module = transformers.ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    encoder = load_backbone(f"hf:{tmp_path}").encoder
    with torch.no_grad():
        expected = model.vit(IMAGES).last_hidden_state[:, 0]  # type: ignore[operator]
        torch.testing.assert_close(encoder(IMAGES), expected)


def test_what_is_not_there_is_said_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"there is no folder /nowhere"):
        load_backbone("hf:/nowhere/at/all")
    hugging_face.make("dinov2").save_pretrained(tmp_path)  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"preprocessor_config.json.*\n.*backbone\.mean"):
        load_backbone(f"hf:{tmp_path}")
    given: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "image_size": 32}
    assert load_backbone(f"hf:{tmp_path}", **given).spec.preprocessing.mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("processor", "side", "share", "mode", "interpolation"),
    [
        ("BitImageProcessor", 224, 224 / 256, "center", "bicubic"),
        ("ViTImageProcessor", 224, 1.0, "squash", "bilinear"),
        ("ConvNextImageProcessor", 384, 1.0, "squash", "bicubic"),
        ("Siglip2ImageProcessor", 256, 1.0, "squash", "bilinear"),
    ],
)
def test_preprocessing_follows_the_processor(
    processor: str, side: int, share: float, mode: str, interpolation: str
) -> None:
    options = {"size": {"shortest_edge": 256}, "crop_size": 224} if processor[0] == "B" else {}
    entries = getattr(transformers, processor)(**options).to_dict()
    found = from_entries(entries, "it")
    assert (found.image_size, found.crop_mode, found.interpolation) == (side, mode, interpolation)
    assert found.crop_pct == pytest.approx(share)
    assert found.mean == pytest.approx(entries["image_mean"])


def test_other_scales_of_pixels_are_kept() -> None:
    entries = {"size": 32, "rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3}
    found = from_entries(entries, "it")  # v / 127.5 - 1
    assert found.mean == pytest.approx([0.5] * 3)
    assert found.std == pytest.approx([0.5] * 3)
    with pytest.raises(ValueError, match="only squares"):
        from_entries({"size": {"height": 32, "width": 48}}, "it")
