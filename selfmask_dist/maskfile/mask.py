"""What a mask file holds, as objects."""

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

# threshold    theta = a W M, a = sqrt(N / kept) or 1
# frozen_sign  theta = s M sign(W)
# sign         theta = s or -s
# ternary      theta = p, -n or 0
# values       theta = what was trained where M = 1, and 0 elsewhere
# graft        theta = what was trained where M = 1, and W elsewhere
Kind = Literal["threshold", "frozen_sign", "sign", "ternary", "values", "graft"]


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
    kind: Kind = "threshold"
    signs: dict[str, Tensor] = field(default_factory=dict)  # of sign and ternary: bool, True is negative
    scales: dict[str, Tensor] = field(
        default_factory=dict
    )  # float64 (parts, 1): s; of ternary (parts, 2): p, n
    values: dict[str, Tensor] = field(default_factory=dict)  # of values and graft: (kept,), row-major
    blocks: dict[str, tuple[int, int]] = field(default_factory=dict)  # rows, columns that share a bit

    def num_weights(self) -> int:
        """Return the number of weights under the mask."""
        return sum(bits.numel() for bits in self.bits.values())

    def num_kept(self) -> int:
        """Return how many of them the mask keeps."""
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
