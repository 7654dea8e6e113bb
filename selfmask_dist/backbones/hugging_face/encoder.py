"""A vision model of transformers as an encoder: images in, one vector an image out.

The vector is the model's own pooled output (CLIP's: the projected one); where it has none, the class token,
or the mean of the tokens where there is no class token. Knows what models of transformers take and return.
"""

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from selfmask_dist.backbones.tokens import Output, has_class_token

_SIZE_FLAG = "interpolate_pos_encoding"


class TransformersEncoder(nn.Module):
    """A vision model of transformers: images (n, channels, H, W) -> embeddings (n, dim).

    model: the model itself; its parameters have their own names, below `model.`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        config: Any = model.config
        if config.model_type == "vit_mae":
            config.mask_ratio = 0.0  # every patch is seen
        self._kind = str(config.model_type)
        self._takes_any_size = _SIZE_FLAG in signature(type(model).forward).parameters
        self._own_size = side_of(config)
        self._patch = _first(getattr(config, "patch_size", 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return one vector an image."""
        return self._pooled(self._run(images))

    def output(self, images: Tensor) -> Output:
        """Return tokens or maps before pooling, after the last normalisation and before any projection."""
        found: Tensor = self._run(images).last_hidden_state
        if self._kind.startswith("clip") and (norm := self._part("post_layernorm")) is not None:
            found = norm(found)  # of other models it is in already
        if found.ndim == 4:
            return Output(found, norm=self._part("layernorm"))  # ConvNeXt's follows pooling
        prefix = int(has_class_token(self.model)) + int(getattr(self.model.config, "num_register_tokens", 0))
        return Output(found, prefix, self._part("pooler.layernorm") if self._kind == "beit" else None)

    def _part(self, name: str) -> nn.Module | None:
        """Return the module of that name, of the model or of the tower inside it; None where it has none."""
        found = dict(self.model.named_modules())
        return found.get(name) or found.get(f"vision_model.{name}")

    def _run(self, images: Tensor) -> Any:
        if self._kind.startswith("siglip2"):
            return self.model(**_as_patches(images, self._patch))
        options: dict[str, Any] = {}
        if self._takes_any_size and self._own_size and tuple(images.shape[-2:]) != self._own_size:
            options[_SIZE_FLAG] = True
        if self._kind == "vit_mae":  # patches stay in their order
            number = (images.shape[-2] // self._patch) * (images.shape[-1] // self._patch)
            noise = torch.arange(number, device=images.device, dtype=torch.float32)
            options["noise"] = noise.expand(len(images), -1)
        return self.model(images, **options)

    def _pooled(self, output: Any) -> Tensor:
        for name in ("image_embeds", "pooler_output"):
            found = getattr(output, name, None)
            if isinstance(found, Tensor):
                return found.flatten(1)
        tokens: Tensor = output.last_hidden_state
        if tokens.ndim == 4:  # (n, channels, height, width)
            return tokens.mean(dim=(2, 3))
        return tokens[:, 0] if has_class_token(self.model) else tokens.mean(dim=1)


def _as_patches(images: Tensor, patch: int) -> dict[str, Any]:
    """Return SigLIP 2's input: patches (n, number, patch * patch * channels), all seen, and their grid."""
    rows, columns = images.shape[-2] // patch, images.shape[-1] // patch
    if rows * patch != images.shape[-2] or columns * patch != images.shape[-1]:
        raise ValueError(
            f"images of {images.shape[-2]} x {images.shape[-1]} are not whole patches of {patch}"
        )
    parts = images.unflatten(-1, (columns, patch)).unflatten(-3, (rows, patch))
    patches = parts.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    return {
        "pixel_values": patches,
        "pixel_attention_mask": torch.ones(patches.shape[:2], dtype=torch.int32, device=images.device),
        "spatial_shapes": torch.tensor([[rows, columns]] * len(images), device="cpu"),
    }


def side_of(config: Any) -> tuple[int, int] | None:
    """Return height and width of the images that the position table is for; None where there is no such."""
    size = getattr(config, "image_size", None)
    if size is None and getattr(config, "num_patches", None):  # SigLIP 2: a square of patches
        size = round(config.num_patches**0.5) * _first(config.patch_size)
    if size is None:
        return None
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _first(value: Any) -> int:
    return int(value[0] if isinstance(value, list | tuple) else value)
