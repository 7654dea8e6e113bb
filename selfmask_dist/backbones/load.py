"""`load_backbone`: build by name, load weights, freeze, and describe what was built.

    encoder(images (n, 3, H, W)) -> embeddings (n, dim), float32

The encoder is timm's own model without a classifier, open_clip's own visual tower, or (below `model.`)
transformers' own model, so parameters keep their names. Knows nothing of masks, data or process groups.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from selfmask_dist.backbones.mapping import leave_in_files
from selfmask_dist.backbones.pooling import use_pool
from selfmask_dist.backbones.random_weights import randomise
from selfmask_dist.backbones.sign_activations import use_sign_activations
from selfmask_dist.backbones.spec import Backbone, BackboneSettings, BackboneSpec, BuiltEncoder, NamedBackbone
from selfmask_dist.backbones.structure import find_blocks, run_on_meta
from selfmask_dist.backbones.weights import fingerprint, trusting_values
from selfmask_dist.common.optional import require


def load_backbone(
    backbone: str | BackboneSettings,
    *,
    seed: int = 0,
    in_file: bool = False,
    reads_all: bool = True,
    dense: bool = False,
    **keys: Any,
) -> Backbone:
    """Build the frozen encoder that `backbone` describes, in eval mode, on the CPU.

        load_backbone("timm:resnet18", weights="resnet18.pth", image_size=96)
        load_backbone(config.backbone)

    Where `section.weights` names a file, a classifier in it is left out and everything else must fit exactly;
    for open_clip it holds a whole CLIP model or the visual tower alone. Position embeddings of loaded weights
    are resampled to `section.image_size` by the library's own rule. The global random generators are left as
    they were.

    Args:
        backbone: a name, `timm:<model>[.<tag>]`, `open_clip:<model>[/<tag>]` or `hf:<model or folder>`, or
            a config's section `backbone`.
        keys: beside a name, other keys of that section: `pretrained`, `weights`, `image_size`, `kwargs`, ...
        seed: of random weights.
        in_file: leave parameters in the file that they are loaded from, in its dtype, for an engine that
            copies each process's share of them; see `mapping`. Random weights, and files that cannot be
            mapped, are loaded as without it.
        reads_all: look at every weight, for the fingerprint and for values that are not finite. Without it
            the fingerprint is empty: for a process of several, of which one reads them for all.
        dense: return one vector a patch, (n, rows, columns, dim), in place of one an image.

    Raises:
        ValueError: unknown name, tag or module (naming the nearest), a hub that cannot be reached, a file
            that is missing, unreadable or does not fit (listing what differs), a model whose output is not
            (n, dim), or its library is not installed.
    """
    if isinstance(backbone, str):
        section: BackboneSettings = NamedBackbone(backbone, **keys)
    elif keys:
        raise TypeError(f"{', '.join(keys)} given beside a section of a configuration, which has these keys")
    else:
        section = backbone
    has_weights = section.pretrained or section.weights is not None
    with nullcontext() if reads_all else trusting_values():
        built, in_file = _build_where(section, seed, in_file=in_file and has_weights)
    if section.random != "library" and not has_weights:
        randomise(built.encoder, section.random, seed=seed)
    if section.activations == "sign":
        use_sign_activations(built.encoder)
    if dense and section.pool != "model":
        raise ValueError(
            f"backbone.pool={section.pool} makes one vector of an image, and dense ones are wanted"
        )
    pool = "map" if dense else section.pool
    use_pool(built.encoder, pool, name=section.name)
    if pool not in ("model", "attention"):  # text has no place among other vectors than the model's own
        built = BuiltEncoder(built.encoder, built.preprocessing)
    given = {key: getattr(section, key) for key in ("image_size", "mean", "std", "crop_pct")}
    preprocessing = replace(
        built.preprocessing, **{key: value for key, value in given.items() if value is not None}
    )
    encoder = built.encoder.eval().requires_grad_(False)
    spec = BackboneSpec(
        name=section.name,
        dim=_measure_dim(
            encoder,
            section.name,
            preprocessing.image_size,
            kwargs=section.kwargs,
            on_meta=in_file,
            ndim=4 if dense else 2,
        ),
        blocks=find_blocks(encoder),
        preprocessing=preprocessing,
        fingerprint=fingerprint(encoder.state_dict().items()) if reads_all else "",
        num_parameters=sum(parameter.numel() for parameter in encoder.parameters()),
    )
    return Backbone(encoder, spec, built.text_embeddings, built.logit_scale, built.text)


def _build_where(section: BackboneSettings, seed: int, *, in_file: bool) -> tuple[BuiltEncoder, bool]:
    """Return the encoder, and whether its weights were left in their file."""
    if in_file and not section.name.startswith("hf:"):  # transformers reads its files by itself
        with leave_in_files():
            built = _build(section, seed)
        if not any(parameter.is_meta for parameter in built.encoder.parameters()):
            return built, True
    built = _build(section, seed)
    built.encoder.float()
    return built, False


def _build(section: BackboneSettings, seed: int) -> BuiltEncoder:
    family, _, model_name = section.name.partition(":")
    # imported here: timm and open_clip take seconds to import, and each is needed by its own models only
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the caller's GPUs as well
        if family == "timm" and model_name:
            from selfmask_dist.backbones import from_timm

            return from_timm.build(model_name, section)
        if family == "open_clip" and model_name:
            require("open_clip", "open_clip_torch", needed_by=f"backbone.name={section.name}")
            from selfmask_dist.backbones import from_open_clip

            return from_open_clip.build(model_name, section)
        if family == "hf" and model_name:
            require("transformers", "transformers", needed_by=f"backbone.name={section.name}")
            from selfmask_dist.backbones.hugging_face import build as from_transformers

            return from_transformers.build(model_name, section)
    raise ValueError(
        f"backbone {section.name!r} is not timm:<model>, open_clip:<model>[/<tag>] or hf:<model or folder>"
    )


@torch.no_grad()
def _measure_dim(
    encoder: nn.Module,
    name: str,
    image_size: int,
    *,
    kwargs: Mapping[str, Any] | None = None,
    on_meta: bool = False,
    ndim: int = 2,
) -> int:
    shape = (2, 3, image_size, image_size)
    try:
        output = run_on_meta(encoder, shape) if on_meta else encoder(torch.zeros(shape, device="cpu"))
    except (AssertionError, RuntimeError, ValueError, TypeError) as error:
        raise ValueError(
            f"{name} cannot run on {image_size} px images: {error}; set backbone.image_size"
        ) from error
    if isinstance(output, Tensor) and output.ndim == ndim and len(output) == 2:
        return output.shape[-1]
    found = str(tuple(output.shape)) if isinstance(output, Tensor) else f"a {type(output).__name__}"
    if isinstance(output, tuple | list):
        found += f" of {len(output)}: " + " and ".join(str(_shape_of(part)) for part in output)
    raise ValueError(
        f"{name} must return embeddings of shape (n, dim); for n = 2 images it returned {found}. "
        f"{_way_to_one_vector(encoder, kwargs or {})}"
    )


def _shape_of(output: Any) -> Any:
    return tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__


def _way_to_one_vector(encoder: nn.Module, kwargs: Mapping[str, Any]) -> str:
    """Return what makes an encoder return other than one vector an image, and the way out."""
    vision = kwargs.get("vision_cfg", {})
    given = vision if isinstance(vision, Mapping) else {}
    if getattr(encoder, "output_tokens", False) and "output_tokens" not in given:
        return (
            "The model's own configuration makes it return its tokens beside the pooled vector (CoCa's text "
            "decoder reads them); set backbone.kwargs={vision_cfg: {output_tokens: false}}"
        )
    culprits = [f"backbone.kwargs.{key}" for key in ("global_pool", "output_tokens") if key in kwargs]
    culprits += [
        f"backbone.kwargs.vision_cfg.{key}" for key in ("pool_type", "output_tokens") if key in given
    ]
    if culprits:
        return f"Take out {' and '.join(culprits)}, which turns pooling off, or choose another model"
    return (
        "Its forward is of that kind by itself: set what makes it pool in backbone.kwargs (timm: "
        "global_pool), or choose another model"
    )
