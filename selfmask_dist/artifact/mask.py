"""What a mask file holds, as objects."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


class MaskFileError(ValueError):
    """A mask file that cannot be read, or does not fit the model at hand."""


class WithoutWeightsError(MaskFileError):
    """A file that is read only together with its backbone's weights, and they were not given."""


@dataclass(frozen=True)
class Mask:
    """One mask: bits per parameter and what is needed to turn them into theta again."""

    bits: dict[str, Tensor]  # bool, the parameter's shape
    weights_fingerprint: str  # of the frozen weights under the mask
    scaled: bool = True  # theta = a W M, or W M
    num_segments: dict[str, int] = field(default_factory=dict)  # parameters with more than one scale
    statistics: dict[str, Tensor] = field(
        default_factory=dict
    )  # moved running statistics of normalisation layers
    threshold: float = 0.0
    against: str | None = None  # an earlier mask of the file that tells which bits are alike

    def num_weights(self) -> int:
        return sum(bits.numel() for bits in self.bits.values())

    def num_kept(self) -> int:
        return sum(int(bits.sum()) for bits in self.bits.values())


@dataclass(frozen=True)
class MaskFile:
    """The contents of a mask file: `masks` by name, and where they come from."""

    masks: dict[str, Mask]
    backbone: str = ""
    backbone_fingerprint: str = ""
    preprocessing: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)  # of a cascade: its router and combinations
