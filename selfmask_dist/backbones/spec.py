"""What a backbone is to the rest of a run: records, without the code that makes them."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from selfmask_dist.common.preprocessing import Preprocessing


@dataclass(frozen=True)
class BackboneSpec:
    """What the rest of a run needs to know of an encoder.

    name: as in the config, `timm:<model>` or `open_clip:<model>`.
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
    """A text tower in parts, for whoever trains with it.

    module: tokens (n, length) -> embeddings (n, dim), not normalised.
    tokenize: n texts -> tokens (n, length).
    """

    module: nn.Module
    tokenize: Callable[[list[str]], Tensor]


@dataclass
class Backbone:
    """A frozen encoder in eval mode, its spec and, for open_clip, its text side.

    text_embeddings: prompts -> (len(prompts), dim), float32, L2-normalised, on the CPU; None where there is
        no text tower with weights of its own (timm, or a weights file of the visual tower alone).
    logit_scale: CLIP's factor on cosine similarities (already exponentiated), or None.
    text: the same text tower in parts.
    """

    encoder: nn.Module
    spec: BackboneSpec
    text_embeddings: Callable[[list[str]], Tensor] | None = None
    logit_scale: float | None = None
    text: TextParts | None = None


@dataclass
class BuiltEncoder:
    """What `from_timm.build` and `from_open_clip.build` hand to `load_backbone`; fields as in `Backbone`."""

    encoder: nn.Module
    preprocessing: Preprocessing
    text_embeddings: Callable[[list[str]], Tensor] | None = None
    logit_scale: float | None = None
    text: TextParts | None = None
