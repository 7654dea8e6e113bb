"""Exported folders are loaded by timm and transformers alone, and give the embeddings of the applied mask."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from selfmask_dist import apply_masks
from selfmask_dist.backbones import load_backbone
from selfmask_dist.backbones.hugging_face.images import read_preprocessing
from selfmask_dist.config.backbone import BackboneConfig
from selfmask_dist.maskfile import read_mask_file
from selfmask_dist.maskfile.tools.export import export
from tests.support.half_masks import mask_half

IMAGES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).sin().view(2, 3, 32, 32)


def masked(section: BackboneConfig, folder: Path) -> tuple[Any, nn.Module]:
    """A backbone, and the same under a mask that is saved as x.mask."""
    frozen, adapted = load_backbone(section), load_backbone(section)
    masks = mask_half(adapted.encoder)
    masks.save(folder / "x.mask")
    masks.detach(restore=True)
    apply_masks(adapted.encoder, folder / "x.mask")
    return frozen, adapted.encoder.eval()


def write(section: BackboneConfig, folder: Path, kwargs: dict[str, Any]) -> nn.Module:
    """Export a masked backbone into `folder`/out; return it."""
    frozen, adapted = masked(section, folder)
    file = read_mask_file(folder / "x.mask")
    export(folder / "out", "x", next(iter(file.masks.values())), file, frozen, kwargs=kwargs)
    return adapted


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18"])
def test_timm_loads_the_folder(name: str, tmp_path: Path) -> None:
    kwargs: dict[str, Any] = (
        {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
        if "vit" in name
        else {"channels": [8, 8, 8, 16], "stem_width": 8}
    )
    section = BackboneConfig(name=f"timm:{name}", pretrained=False, image_size=32, kwargs=kwargs)
    size = {"img_size": 32} if "vit" in name else {}
    adapted = write(section, tmp_path, {**size, **kwargs})
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    with torch.inference_mode():
        assert torch.equal(model(IMAGES), adapted(IMAGES))
    data: Any = timm.data.resolve_data_config({}, model=model)
    stated = load_backbone(section).spec.preprocessing
    assert (tuple(data["mean"]), tuple(data["std"])) == (stated.mean, stated.std)
    assert (data["input_size"][1], data["crop_pct"]) == (32, stated.crop_pct)
    assert "local-dir:." in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("name", ["dinov2", "clip"])
def test_transformers_loads_the_folder(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from tests.support import hugging_face

    hugging_face.save(name, tmp_path / "frozen")
    section = BackboneConfig(name=f"hf:{tmp_path / 'frozen'}")
    adapted = write(section, tmp_path, {})
    kind = type(adapted.model).__name__
    model = getattr(transformers, kind).from_pretrained(tmp_path / "out").eval()
    with torch.inference_mode():
        found = model(IMAGES)
        pooled = found.image_embeds if name == "clip" else found.pooler_output
        assert torch.equal(pooled, adapted(IMAGES))
    assert f"{kind}.from_pretrained" in (tmp_path / "out" / "README.md").read_text()
    stated = load_backbone(section).spec.preprocessing
    again = read_preprocessing(
        str(tmp_path / "out"), "out", model_size=32, image_size=None, may_be_missing=False
    )
    assert again == stated
    whole = load_backbone(BackboneConfig(name=f"hf:{tmp_path / 'out'}"))
    with torch.inference_mode():
        assert torch.equal(whole.encoder.eval()(IMAGES), adapted(IMAGES))
