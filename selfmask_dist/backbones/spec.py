"""What describes a backbone, before and after it is built: records, without the code that builds it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from selfmask_dist.common.preprocessing import Preprocessing


class BackboneSettings(Protocol):
    """What `load_backbone` reads of a config's section `backbone`, whose help says what each key does.

    It is a protocol because this package stands beside `config` and does not import it.
    """

    @property
    def name(self) -> str: ...
    @property
    def pretrained(self) -> bool: ...
    @property
    def weights(self) -> str | Path | None: ...
    @property
    def weights_key(self) -> str | None: ...
    @property
    def random(self) -> str: ...
    @property
    def activations(self) -> str: ...
    @property
    def image_size(self) -> int | None: ...
    @property
    def kwargs(self) -> Mapping[str, Any]: ...
    @property
    def remove(self) -> Sequence[str]: ...
    @property
    def pool(self) -> str: ...
    @property
    def mean(self) -> Sequence[float] | None: ...
    @property
    def std(self) -> Sequence[float] | None: ...
    @property
    def crop_pct(self) -> float | None: ...


@dataclass(frozen=True)
class NamedBackbone:
    """A `BackboneSettings` for callers without a configuration: a name, and the other keys at their defaults.

    A test holds the defaults against those of the config's section, which says what each key does.
    """

    name: str
    pretrained: bool = True
    weights: str | Path | None = None
    weights_key: str | None = None
    random: str = "library"
    activations: str = "library"
    image_size: int | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    remove: Sequence[str] = ()
    pool: str = "model"
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    crop_pct: float | None = None


@dataclass(frozen=True)
class BackboneSpec:
    """What the rest of a run needs to know of an encoder.

    name: as in the config, `timm:<model>`, `open_clip:<model>` or `hf:<model or folder>`.
    dim: length of an embedding; of a dense encoder, of one patch's vector.
    blocks: module names of the repeated blocks, for wrapping block by block; none lies inside another.
    preprocessing: how the encoder wants its images.
    fingerprint: `weights.fingerprint` of parameters and persistent buffers; empty where another process is to
        say it.
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
    """What each library's `build` hands to `load_backbone`; fields as in `Backbone`."""

    encoder: nn.Module
    preprocessing: Preprocessing
    text_embeddings: Callable[[list[str]], Tensor] | None = None
    logit_scale: float | None = None
    text: TextParts | None = None
