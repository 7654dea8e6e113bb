"""What an encoder has of an image before it is pooled: one vector a patch, and the class token beside them.

    dense_features(encoder, images (n, channels, H, W)) -> (n, rows, columns, C)
    tokens_of(encoder, images)                          -> patches, class token, the norm that follows

For encoders of timm, open_clip, transformers (`hugging_face.encoder`) and torchvision. Vectors are those of
the last layer, after the last normalisation and before any projection (CLIP's) or classifier; registers are
left out. Knows how the libraries' models are laid out; nothing of pooling, masks or data.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Tokens:
    """The last layer's output for n images.

    patches: (n, rows, columns, C), rows from the top and columns from the left.
    class_token: (n, C); None where the model has none.
    norm: the model's own last normalisation (..., C) -> (..., C) where it comes after pooling; the identity
        where it is in the vectors already.
    """

    patches: Tensor
    class_token: Tensor | None
    norm: Callable[[Tensor], Tensor]


def dense_features(encoder: nn.Module, images: Tensor) -> Tensor:
    """Return one vector for each patch or cell of the last map, (n, rows, columns, C), normalised.

    It runs the encoder's parts and not its forward: wrappers and hooks of the encoder itself are passed by.
    Where those count (a sharded or compiled encoder), `pooling.use_pool(encoder, "map")` makes this the
    forward.

    Args:
        images: (n, channels, H, W), as the encoder takes them.

    Raises:
        ValueError: the model's output is not laid out in a way that is known.
    """
    found = tokens_of(encoder, images)
    return found.norm(found.patches)


def tokens_of(encoder: nn.Module, images: Tensor) -> Tokens:
    """Return the last layer's output before pooling; see `Tokens`.

    Args:
        images: (n, channels, H, W), as the encoder takes them.

    Raises:
        ValueError: the model's output is not laid out in a way that is known.
    """
    library, model = library_of(encoder), encoder
    if library == "open_clip" and isinstance(getattr(encoder, "trunk", None), nn.Module):
        library, model = "timm", encoder.get_submodule("trunk")
    if library == "transformers":
        own: Any = encoder
        output: Output = own.output(images)
    elif library == "timm":
        output = _of_timm(model, images)
    elif library == "open_clip":
        output = _of_open_clip(model, images)
    else:
        output = _of_torchvision(model, images)
    size = (int(images.shape[-2]), int(images.shape[-1]))
    return _laid_out(output, size, type(model).__name__)


def has_class_token(encoder: nn.Module) -> bool:
    """Return whether a model of one of the libraries has a class token."""
    ends = ("cls_token", "class_token", "class_embedding")
    return any(name.endswith(ends) for name, _ in encoder.named_parameters())


def library_of(encoder: nn.Module) -> str:
    """Return which library a model is of: timm, open_clip, transformers or torchvision.

    Raises:
        ValueError: of none of them.
    """
    for kind in type(encoder).__mro__:
        if kind.__module__.startswith("selfmask_dist.backbones.hugging_face."):
            return "transformers"
        library = kind.__module__.partition(".")[0]
        if library in ("timm", "open_clip", "torchvision"):
            return library
    raise ValueError(
        f"patch tokens of a {type(encoder).__name__} are not known: it is not a model of timm, open_clip, "
        "torchvision or `hf:`. Take them from the model itself"
    )


# ---- what each library's models give: see `Output`


@dataclass(frozen=True)
class Output:
    """What a model gives before pooling.

    features: tokens (n, prefix + patches, C), or a map (n, C, rows, columns), or (n, rows, columns, C) where
        `is_channels_last`.
    prefix: number of tokens before the patches, the class token first.
    norm: see `Tokens`, as the model's own module.
    """

    features: Tensor
    prefix: int = 0
    norm: nn.Module | None = None
    is_channels_last: bool = False


def _of_timm(model: Any, images: Tensor) -> Output:
    prefix = getattr(model, "num_prefix_tokens", None)
    if prefix is None:
        prefix = 1 if has_class_token(model) else 0
    norm = getattr(model, "fc_norm", None)
    if norm is None:
        norm = getattr(getattr(model, "head", None), "norm", None)
    is_last = getattr(model, "output_fmt", None) == "NHWC"
    return Output(model.forward_features(images), prefix, norm, is_last)


def _of_open_clip(model: Any, images: Tensor) -> Output:
    if hasattr(model, "layer4"):  # its ResNets
        return Output(_through(model, ("stem", "layer1", "layer2", "layer3", "layer4"), images))
    tokens = model.transformer(model._embeds(images))
    if model.attn_pool is not None:  # CoCa's attention pooling takes them as they are; its norm is behind it
        return Output(tokens, 1)
    if model.final_ln_after_pool:
        return Output(tokens, 1, model.ln_post)
    return Output(model.ln_post(tokens), 1)


def _of_torchvision(model: Any, images: Tensor) -> Output:
    if hasattr(model, "conv_proj"):  # VisionTransformer
        patches = model._process_input(images)
        first = model.class_token.expand(len(images), -1, -1)
        return Output(model.encoder(torch.cat((first, patches), dim=1)), 1)
    if hasattr(model, "layer4"):  # ResNet and its like
        names = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
        return Output(_through(model, names, images))
    if not isinstance(getattr(model, "features", None), nn.Module):
        raise ValueError(f"the feature maps of torchvision's {type(model).__name__} are not known")
    features = model.features(images)
    if hasattr(model, "permute"):  # Swin
        return Output(model.norm(features), is_channels_last=True)
    classifier = getattr(model, "classifier", None)
    first = next(iter(classifier), None) if isinstance(classifier, nn.Sequential) else None
    return Output(features, norm=first if isinstance(first, nn.LayerNorm) else None)  # ConvNeXt's


def _through(model: nn.Module, names: tuple[str, ...], images: Tensor) -> Tensor:
    for name in names:
        images = model.get_submodule(name)(images)
    return images


# ---- one layout for all


def _laid_out(output: Output, size: tuple[int, int], name: str) -> Tokens:
    features, norm = output.features, _over_last(output.norm)
    if features.ndim == 4:
        return Tokens(features if output.is_channels_last else features.permute(0, 2, 3, 1), None, norm)
    if features.ndim != 3:
        raise ValueError(
            f"the features of {name} are of shape {tuple(features.shape)}: neither tokens nor maps"
        )
    grid = _grid(features.shape[1] - output.prefix, size, name)
    patches = features[:, output.prefix :].unflatten(1, grid)
    return Tokens(patches, features[:, 0] if output.prefix else None, norm)


def _grid(number: int, size: tuple[int, int], name: str) -> tuple[int, int]:
    """Return rows and columns of so many square patches of an image of height and width `size`.

    A border that is no whole patch may be left out.
    """
    height, width = size
    for rows in range(1, number + 1):
        columns = number // rows
        if rows * columns == number:
            largest = min(height / rows, width / columns)
            if max(height / (rows + 1), width / (columns + 1)) < largest:
                return rows, columns
    raise ValueError(
        f"{name} gives {number} patches for images of {height} x {width}, which are no grid of that "
        "shape: it drops or merges patches"
    )


def _over_last(norm: nn.Module | None) -> Callable[[Tensor], Tensor]:
    """Return a normalisation as a function of vectors (..., C), also where it takes maps (n, C, H, W)."""
    if norm is None or isinstance(norm, nn.Identity):
        return lambda vectors: vectors
    if not isinstance(norm, nn.GroupNorm) and not type(norm).__name__.endswith("2d"):
        return norm

    def over_maps(vectors: Tensor) -> Tensor:
        flat: Tensor = norm(vectors.reshape(-1, vectors.shape[-1], 1, 1))
        return flat.reshape(vectors.shape)

    return over_maps
