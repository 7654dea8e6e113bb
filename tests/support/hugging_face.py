"""Tiny vision models of transformers with random weights, saved as a hub would have them."""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

_VIT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
_TEXT = {key: _VIT[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
_TEXT = {
    **_TEXT,
    "intermediate_size": 64,
    "vocab_size": 99,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_STAGES = {"depths": [1, 2], "num_channels": 3, "image_size": 32}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "dinov2": ("Dinov2Config", {**_VIT, "mlp_ratio": 2}),
    "dinov2_swiglu": ("Dinov2Config", {**_VIT, "mlp_ratio": 2, "use_swiglu_ffn": True}),
    "dinov2_registers": ("Dinov2WithRegistersConfig", {**_VIT, "mlp_ratio": 2, "num_register_tokens": 2}),
    "dinov3": ("DINOv3ViTConfig", {**_VIT, "num_register_tokens": 2, "use_gated_mlp": True}),
    "clip_vision": ("CLIPVisionConfig", _VIT),
    "siglip_vision": ("SiglipVisionConfig", _VIT),
    "siglip2_vision": (
        "Siglip2VisionConfig",
        {**{key: value for key, value in _VIT.items() if key != "image_size"}, "num_patches": 16},
    ),
    "vit_mae": ("ViTMAEConfig", _VIT),
    "vit": ("ViTConfig", _VIT),
    "swin": (
        "SwinConfig",
        {**_STAGES, "embed_dim": 16, "num_heads": [2, 2], "window_size": 4, "patch_size": 4},
    ),
    "convnext": ("ConvNextConfig", {**_STAGES, "hidden_sizes": [16, 32], "num_stages": 2}),
    "clip": (
        "CLIPConfig",
        {
            "text_config": {**_TEXT, "projection_dim": 16},
            "vision_config": {**_VIT, "projection_dim": 16},
            "projection_dim": 16,
        },
    ),
    "siglip": ("SiglipConfig", {"text_config": _TEXT, "vision_config": _VIT}),
}


def make(name: str) -> nn.Module:
    """A seeded model; every parameter that starts as zeros is drawn, so that each term counts."""
    kind, entries = CONFIGS[name]
    config = getattr(transformers, kind)(**entries)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = transformers.AutoModel.from_config(config)
        for key, parameter in model.named_parameters():
            if not parameter.any() and "position" not in key:
                nn.init.normal_(parameter, std=0.1)
    return model.eval()


def save(name: str, folder: Path, *, processor: Any = None) -> nn.Module:
    """Save that model, and how it wants its images, into a folder; return the model."""
    model: Any = make(name)
    model.save_pretrained(folder)
    side = {"height": 32, "width": 32}
    processor = processor or transformers.SiglipImageProcessor(size=side)
    processor.save_pretrained(folder)
    return model
