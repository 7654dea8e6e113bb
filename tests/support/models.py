"""Small models of each family the presets cover, in float64 where a test compares to rounding."""

import timm
import torch
from torch import Tensor, nn

from selfmask_dist.masking import AttachedMasks


class ConvNet(nn.Module):
    """Convolutions, batch normalisation and a downsample layer, named as in timm's ResNets."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
        self.downsample = nn.Sequential(nn.Conv2d(8, 16, 1, stride=2, bias=False), nn.BatchNorm2d(16))
        self.bn2 = nn.BatchNorm2d(16)

    def forward(self, images: Tensor) -> Tensor:
        x = self.bn1(self.conv1(images)).relu()
        x = (self.bn2(self.conv2(x)) + self.downsample(x)).relu()
        return x.mean(dim=(2, 3))


def conv_net() -> nn.Module:
    return ConvNet()


def timm_vit() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=2, num_classes=0
    )


def open_clip_tower() -> nn.Module:
    from open_clip.transformer import VisionTransformer

    return VisionTransformer(
        image_size=16, patch_size=4, width=24, layers=2, heads=2, mlp_ratio=4.0, output_dim=16
    )


FAMILIES = {
    "conv": (conv_net, "resnet"),
    "timm_vit": (timm_vit, "vit"),
    "open_clip": (open_clip_tower, "vit"),
}


def make(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, str]:
    """A seeded model of a family, and the preset that masks it."""
    build, preset = FAMILIES[family]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build().to(dtype)
        # biases and position embeddings start at zero: make every term count
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.1)
    return model, preset


def scores_of(masks: AttachedMasks) -> dict[str, Tensor]:
    """The scores by name, without the step and the fingerprint that a state dict has beside them."""
    return {entry.name: entry.scores.detach() for entry in masks.entries}
