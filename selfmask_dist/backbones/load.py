"""`load_backbone`: build by name, load weights, freeze, and describe what was built.

    encoder(images (n, 3, H, W)) -> embeddings (n, dim), float32

The encoder is timm's own model without a classifier, or open_clip's own visual tower, so parameters keep
their names. Knows nothing of masks, data or process groups.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from selfmask_dist.backbones.mapping import leave_in_files
from selfmask_dist.backbones.random_weights import randomise
from selfmask_dist.backbones.sign_activations import use_sign_activations
from selfmask_dist.backbones.spec import Backbone, BackboneSettings, BackboneSpec, BuiltEncoder
from selfmask_dist.backbones.structure import find_blocks, run_on_meta
from selfmask_dist.backbones.weights import fingerprint
from selfmask_dist.common.optional import require


def load_backbone(section: BackboneSettings, *, seed: int = 0, in_file: bool = False) -> Backbone:
    """Build the frozen encoder that `section` describes, in eval mode, on the CPU.

    Where `section.weights` names a file, a classifier in it is left out and everything else must fit exactly;
    for open_clip it holds a whole CLIP model or the visual tower alone. Position embeddings of loaded weights
    are resampled to `section.image_size` by the library's own rule. The global random generators are left as
    they were.

    Args:
        section: a config's section `backbone`, or whatever has its keys.
        seed: of random weights.
        in_file: leave parameters in the file that they are loaded from, in its dtype, for an engine that
            copies each process's share of them; see `mapping`. Random weights, and files that cannot be
            mapped, are loaded as without it.

    Raises:
        ValueError: unknown name, tag or module (naming the nearest), a hub that cannot be reached, a file
            that is missing, unreadable or does not fit (listing what differs), a model whose output is not
            (n, dim), or open_clip is not installed.
    """
    has_weights = section.pretrained or section.weights is not None
    in_file = in_file and has_weights
    if in_file:
        with leave_in_files():
            built = _build(section, seed)
        in_file = not any(parameter.is_meta for parameter in built.encoder.parameters())
    if not in_file:
        built = _build(section, seed)
        built.encoder.float()
    if section.random != "library" and not has_weights:
        randomise(built.encoder, section.random, seed=seed)
    if section.activations == "sign":
        use_sign_activations(built.encoder)
    given = {key: getattr(section, key) for key in ("image_size", "mean", "std", "crop_pct")}
    preprocessing = replace(
        built.preprocessing, **{key: value for key, value in given.items() if value is not None}
    )
    encoder = built.encoder.eval().requires_grad_(False)
    spec = BackboneSpec(
        name=section.name,
        dim=_measure_dim(encoder, section.name, preprocessing.image_size, on_meta=in_file),
        blocks=find_blocks(encoder),
        preprocessing=preprocessing,
        fingerprint=fingerprint(encoder.state_dict().items()),
        num_parameters=sum(parameter.numel() for parameter in encoder.parameters()),
    )
    return Backbone(encoder, spec, built.text_embeddings, built.logit_scale, built.text)


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
    raise ValueError(f"backbone {section.name!r} is not timm:<model> or open_clip:<model>[/<tag>]")


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
