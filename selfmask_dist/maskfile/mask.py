"""What a mask file holds, as objects."""

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from selfmask_dist.maskfile.model.part import Model

Kind = Literal["threshold", "frozen_sign", "sign", "ternary", "values", "graft", "delta"]  # see `forms`


class MaskFileError(ValueError):
    """A mask file that cannot be read, or does not fit the model at hand."""


class MarkedMaskWarning(UserWarning):
    """A mask that its own training found to be of no use is put on a model."""


class WithoutWeightsError(MaskFileError):
    """A file that is read only together with its backbone's weights, and they were not given."""


@dataclass(frozen=True)
class Mask:
    """One mask: bits per parameter, and what is needed to turn them into theta again; see `forms`.

    bits: bool, of the parameter's shape, by its name.
    weights_fingerprint: of the frozen weights under the mask.
    scaled: theta = a W M, not W M.
    num_segments: of the parameters that have more than one scale.
    statistics: running statistics of normalisation layers that moved in training.
    threshold: mu, above which scores were kept.
    against: an earlier mask of the file that tells which bits are alike.
    kind: what the bits and the other parts mean.
    signs: of kinds sign, ternary and delta: bool, True is negative.
    scales: float64, (segments, 1): s; of kind ternary (segments, 2): p and n.
    values: of kinds values and graft: (kept,), in row-major order.
    blocks: rows and columns that share a bit, of the parameters that have blocks.
    rounded: fingerprints of the same weights in half precision, by dtype (`float16`, `bfloat16`), where they
        are known.
    """

    bits: dict[str, Tensor]
    weights_fingerprint: str
    scaled: bool = True
    num_segments: dict[str, int] = field(default_factory=dict)
    statistics: dict[str, Tensor] = field(default_factory=dict)
    threshold: float = 0.0
    against: str | None = None
    kind: Kind = "threshold"
    signs: dict[str, Tensor] = field(default_factory=dict)
    scales: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    blocks: dict[str, tuple[int, int]] = field(default_factory=dict)
    rounded: dict[str, str] = field(default_factory=dict)

    def num_weights(self) -> int:
        """Return the number of weights under the mask."""
        return sum(bits.numel() for bits in self.bits.values())

    def num_kept(self) -> int:
        """Return how many of them the mask keeps."""
        return sum(int(bits.sum()) for bits in self.bits.values())


@dataclass(frozen=True)
class MaskFile:
    """The contents of a mask file: `masks` by name, and where they come from.

    tensors: of a cascade, its router and combinations.
    verdict: what the run that trained it found against it, for example that the frozen backbone is to be
        kept; empty where it found nothing.
    models: what makes a mask, or a cascade's mode, answer with a class, by its name.
    """

    masks: dict[str, Mask]
    backbone: str = ""
    backbone_fingerprint: str = ""
    preprocessing: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    verdict: str = ""
    models: dict[str, Model] = field(default_factory=dict)
