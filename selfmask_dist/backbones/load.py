"""`load_backbone`: build by name, load weights, freeze, and describe what was built.

    encoder(images (n, 3, H, W)) -> embeddings (n, dim), float32

The encoder is timm's own model without a classifier, or open_clip's own visual tower, so parameters keep
their names. Knows nothing of masks, data or process groups.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from selfmask_dist.backbones.mapping import leave_in_files
from selfmask_dist.backbones.random_weights import randomise
from selfmask_dist.backbones.sign_activations import use_sign_activations
from selfmask_dist.backbones.structure import find_blocks, run_on_meta
from selfmask_dist.backbones.weights import fingerprint
from selfmask_dist.common.preprocessing import Preprocessing


@dataclass(frozen=True)
class BackboneSpec:
    """What the rest of a run needs to know of an encoder.

    name: as given to `load_backbone`.
    dim: length of an embedding.
    blocks: module names of the repeated blocks, for wrapping block by block; none lies inside another.
    preprocessing: how the encoder wants its images.
    fingerprint: `weights.fingerprint` of parameters and persistent buffers.
    num_parameters: scalars in all parameters.
    """

    name: str
    dim: int
    blocks: tuple[str, ...]
    preprocessing: Preprocessing
    fingerprint: str
    num_parameters: int


@dataclass(frozen=True)
class TextParts:
    """module: tokens (n, length) -> embeddings (n, dim), not normalised. tokenize: texts -> tokens."""

    module: nn.Module
    tokenize: Callable[[list[str]], Tensor]


@dataclass
class Backbone:
    """A frozen encoder in eval mode, its spec and, for open_clip, its text side.

    text_embeddings: prompts -> (len(prompts), dim), float32, L2-normalised, on the CPU; None where there is
        no text tower with weights of its own (timm, or a weights file of the visual tower alone).
    logit_scale: CLIP's factor on cosine similarities (already exponentiated), or None.
    text: the same text tower in parts, for whoever trains with it.
    """

    encoder: nn.Module
    spec: BackboneSpec
    text_embeddings: Callable[[list[str]], Tensor] | None = None
    logit_scale: float | None = None
    text: TextParts | None = None


@dataclass
class Built:
    """What a library's builder hands to `load_backbone`; fields as in `Backbone`."""

    encoder: nn.Module
    preprocessing: Preprocessing
    text_embeddings: Callable[[list[str]], Tensor] | None = None
    logit_scale: float | None = None
    text: TextParts | None = None


def load_backbone(
    name: str,
    *,
    pretrained: bool = True,
    weights: str | Path | None = None,
    image_size: int | None = None,
    kwargs: Mapping[str, Any] | None = None,
    remove: Sequence[str] = (),
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    crop_pct: float | None = None,
    random: str = "library",
    activations: str = "library",
    seed: int = 0,
    in_file: bool = False,
) -> Backbone:
    """Build a frozen encoder by name.

    Args:
        name: `timm:<model>[.<tag>]` or `open_clip:<model>[/<pretrained tag>]`.
        pretrained: load the published weights of that name (from the hub, or its cache); False leaves random
            weights.
        weights: a local file to load instead: safetensors, or a state dict that
            `torch.load(weights_only=True)` reads. A classifier in it is left out; everything else must fit
            exactly. For open_clip, a whole CLIP model or the visual tower alone.
        image_size: pixels on a side; None for the model's own. Position embeddings of loaded weights are
            resampled by the library's own rule.
        kwargs: for the model's constructor. For open_clip, `vision_cfg` and `text_cfg` overlay the registered
            ones.
        remove: names of modules that become `nn.Identity` ("layer4"); keys under them in `weights` are left
            out.
        mean, std: per RGB channel, for pixels in 0..1; None for the model's own.
        crop_pct: fraction of the resized short side that the centre crop keeps; None for the model's own,
            also where `image_size` differs from the model's.
        random: where no weights are loaded: as the `library` draws them, or a kind of `random_weights`.
        activations: the network's own (`library`), or their `sign`, see `sign_activations`.
        seed: of the random weights. The global generators are left as they were.
        in_file: leave parameters in the file that they are loaded from, in its dtype, for an engine that
            copies each process's share of them; see `mapping`. Random weights, and files that cannot be
            mapped, are loaded as without it.

    Raises:
        ValueError: unknown name, tag or module (naming the nearest), a hub that cannot be reached, a file
            that is missing, unreadable or does not fit (listing what differs), or a model whose output is not
            (n, dim).
    """
    build = partial(_build, name, pretrained, weights, image_size, dict(kwargs or {}), remove, seed)
    in_file = in_file and (pretrained or weights is not None)
    if in_file:
        with leave_in_files():
            built = build()
        in_file = not any(parameter.is_meta for parameter in built.encoder.parameters())
    if not in_file:
        built = build()
        built.encoder.float()
    if random != "library" and not pretrained and weights is None:
        randomise(built.encoder, random, seed=seed)
    if activations == "sign":
        use_sign_activations(built.encoder)
    given: dict[str, Any] = {"image_size": image_size, "mean": mean, "std": std, "crop_pct": crop_pct}
    preprocessing = replace(
        built.preprocessing, **{key: value for key, value in given.items() if value is not None}
    )
    encoder = built.encoder.eval().requires_grad_(False)
    spec = BackboneSpec(
        name=name,
        dim=_measure_dim(encoder, name, preprocessing.image_size, on_meta=in_file),
        blocks=find_blocks(encoder),
        preprocessing=preprocessing,
        fingerprint=fingerprint(encoder.state_dict().items()),
        num_parameters=sum(parameter.numel() for parameter in encoder.parameters()),
    )
    return Backbone(encoder, spec, built.text_embeddings, built.logit_scale, built.text)


def _build(
    name: str,
    pretrained: bool,
    weights: str | Path | None,
    image_size: int | None,
    kwargs: dict[str, Any],
    remove: Sequence[str],
    seed: int,
) -> Built:
    family, _, model_name = name.partition(":")
    # imported here: timm and open_clip take seconds to import, and each is needed by its own models only
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the caller's GPUs as well
        if family == "timm" and model_name:
            from selfmask_dist.backbones import from_timm

            return from_timm.build(model_name, pretrained, weights, image_size, dict(kwargs), remove)
        if family == "open_clip" and model_name:
            from selfmask_dist.backbones import from_open_clip

            return from_open_clip.build(model_name, pretrained, weights, image_size, dict(kwargs), remove)
    raise ValueError(f"backbone {name!r} is not timm:<model> or open_clip:<model>[/<tag>]")


@torch.no_grad()
def _measure_dim(encoder: nn.Module, name: str, image_size: int, *, on_meta: bool = False) -> int:
    shape = (2, 3, image_size, image_size)
    try:
        output = run_on_meta(encoder, shape) if on_meta else encoder(torch.zeros(shape, device="cpu"))
    except (AssertionError, RuntimeError, ValueError, TypeError) as error:
        raise ValueError(
            f"{name} cannot run on {image_size} px images: {error}; set backbone.image_size"
        ) from error
    if isinstance(output, Tensor) and output.ndim == 2 and len(output) == 2:
        return output.shape[1]
    found = tuple(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
    raise ValueError(
        f"{name} must return embeddings of shape (n, dim); for n = 2 images it returned {found}. Take out of "
        "backbone.kwargs what turns pooling off (global_pool='', output_tokens=True), or choose another "
        "model"
    )
