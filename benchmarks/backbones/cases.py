"""The architectures of `coverage`: small variants of each library's families, with random weights."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torchvision  # type: ignore[import-untyped]
from torch import nn

from selfmask_dist.backbones import load_backbone

_TIMM = (
    *("resnet18", "regnety_002", "convnext_atto", "vit_tiny_patch16_224", "mobilenetv3_small_050"),
    *("vit_small_plus_patch16_dinov3", "vit_small_patch16_dinov3", "eva02_tiny_patch14_224"),
    *("vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2", "deit3_small_patch16_224"),
    *("eva02_base_patch14_224", "vit_base_patch16_siglip_224", "beit_base_patch16_224", "caformer_s18"),
    *("poolformer_s12", "mambaout_femto", "edgenext_xx_small", "pvt_v2_b0", "swin_tiny_patch4_window7_224"),
    *("swinv2_tiny_window8_256", "maxvit_nano_rw_256", "coatnet_nano_rw_224", "efficientnet_b0"),
    *("convnextv2_atto", "mixer_s16_224", "resmlp_12_224", "gmlp_s16_224", "xcit_nano_12_p16_224"),
    *("levit_128s", "cait_xxs24_224", "fastvit_t8", "repvgg_a0", "seresnet18", "resnext26ts", "resnet50"),
    *("resnetv2_18", "res2net50_26w_4s", "resnest14d", "densenet121", "mobilenetv4_conv_small_035"),
    *("eca_nfnet_l0", "dla34", "nfnet_f0", "twins_svt_small", "hiera_tiny_224", "focalnet_tiny_srf"),
    *("davit_tiny", "resnetv2_50x1_bit"),
)
# arguments that make a model shallow where even its smallest variant is not, by the start of its name
_SHALLOW: dict[str, dict[str, Any]] = {
    **{start: {"depth": 3} for start in ("vit_small", "vit_base", "eva02", "deit3", "beit")},
    **{start: {"depths": [1, 1, 2, 1]} for start in ("swin_", "swinv2")},
}
_CLIP: dict[str, Any] = {"vision_cfg": {"layers": 3}, "text_cfg": {"layers": 1}}
_SHORT_TEXT: dict[str, Any] = {"text_cfg": {"layers": 1}}
_OPEN_CLIP = {
    **dict.fromkeys(("ViT-S-32", "ViT-M-32", "ViT-B-32", "ViT-B-32-quickgelu"), _CLIP),
    **dict.fromkeys(("RN50", "convnext_tiny", "EVA02-B-16", "MobileCLIP2-S0"), _SHORT_TEXT),
}
_TORCHVISION = ("resnet18", "swin_t", "convnext_tiny", "mobilenet_v3_small", "vit_b_32")
_WIDTHS = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "num_hidden_layers": 4}
# kind of configuration, and entries of it
_TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "dinov2": ("Dinov2Config", _WIDTHS),
    "dinov2 swiglu": ("Dinov2Config", {**_WIDTHS, "use_swiglu_ffn": True}),
    "dinov2 registers": ("Dinov2WithRegistersConfig", _WIDTHS),
    "dinov3": ("DINOv3ViTConfig", _WIDTHS),
    "dinov3 gated": ("DINOv3ViTConfig", {**_WIDTHS, "use_gated_mlp": True}),
    "clip vision": ("CLIPVisionConfig", _WIDTHS),
    "siglip vision": ("SiglipVisionConfig", _WIDTHS),
    "siglip2 vision": ("Siglip2VisionConfig", _WIDTHS),
    "vit_mae": ("ViTMAEConfig", _WIDTHS),
    "vit": ("ViTConfig", _WIDTHS),
    "beit": ("BeitConfig", _WIDTHS),
    "swin": ("SwinConfig", {"embed_dim": 48}),
    "convnext": ("ConvNextConfig", {"hidden_sizes": [48, 96, 192, 384], "depths": [1, 1, 3, 1]}),
}


def _arguments(model: str) -> dict[str, Any]:
    return next((entries for start, entries in _SHALLOW.items() if model.startswith(start)), {})


@dataclass(frozen=True)
class Case:
    """One architecture; `sizes` of images are tried in turn, None is the model's own."""

    library: str
    model: str
    entries: dict[str, Any] = field(default_factory=dict)
    sizes: tuple[int | None, ...] = (64, 56, None)

    @property
    def name(self) -> str:
        return f"{self.library}:{self.model}"


CASES = {
    case.name: case
    for case in (
        *(Case("timm", model, _arguments(model)) for model in _TIMM),
        *(Case("transformers", model) for model in _TRANSFORMERS),
        *(Case("torchvision", model, sizes=(224 if "vit" in model else 64,)) for model in _TORCHVISION),
        *(Case("open_clip", model, entries, (64, None)) for model, entries in _OPEN_CLIP.items()),
    )
}


def build(case: Case, folder: Path) -> tuple[nn.Module, int]:
    """Return the frozen model with random weights, the same in every process, and the side of its images."""
    if case.library == "torchvision":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = torchvision.models.get_model(case.model)
        if hasattr(model, "heads"):  # a ViT's classifier starts as zeros, and lets no gradient through
            model.heads = nn.Identity()
        size = case.sizes[0]
        assert size is not None
        return model.eval().requires_grad_(False), size
    name, kwargs = case.name, case.entries
    if case.library == "transformers":
        name = f"hf:{_write_config(case.model, folder)}"
    for size in case.sizes:
        try:
            backbone = load_backbone(name, pretrained=False, image_size=size, kwargs=kwargs)
        except ValueError:
            if size is case.sizes[-1]:
                raise
            continue
        return backbone.encoder, backbone.spec.preprocessing.image_size
    raise AssertionError(case)


def _write_config(model: str, folder: Path) -> Path:
    """Write a model's configuration and how it wants its images into a folder, as a hub has them."""
    import transformers

    kind, entries = _TRANSFORMERS[model]
    place = folder / model.replace(" ", "-")
    getattr(transformers, kind)(**entries).save_pretrained(place)
    transformers.SiglipImageProcessor().save_pretrained(place)
    return place
