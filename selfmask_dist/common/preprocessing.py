"""How a backbone wants its pictures: size, crop, interpolation and normalisation.

A plain record: the backbone's spec holds one, `data.views` obeys it, a mask file carries it. Knows neither
torch nor PIL. A pixel v in 0..255 of channel c enters the encoder as (v / 255 - mean[c]) / std[c].
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
CROP_MODES = ("center", "squash")
MAX_CHANNELS = 16


@dataclass(frozen=True)
class Preprocessing:
    """The evaluation preprocessing that a backbone was trained with, in timm's terms.

    image_size: pixels on a side of the encoder's square input.
    mean, std: per channel, for pixels scaled to 0..1; as many as the picture has channels, three of RGB.
    interpolation: one of `INTERPOLATIONS`.
    crop_pct: fraction of the resized short side that the centre crop keeps; above 1 it pads with black, as
        timm does.
    crop_mode: "center" resizes the short side and crops; "squash" resizes both sides and crops.
    Raises ValueError for a value outside these ranges.
    """

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise ValueError(f"image_size is {self.image_size}; it must be at least 1 pixel")
        object.__setattr__(self, "mean", _channels("mean", self.mean))
        object.__setattr__(self, "std", _channels("std", self.std))
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} channels and std {len(self.std)}")
        if min(self.std) <= 0:
            raise ValueError(f"std is {self.std}; each channel's must be above 0")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(
                f"interpolation is {self.interpolation!r}; choose from {', '.join(INTERPOLATIONS)}"
            )
        if not 0 < self.crop_pct <= 2:
            raise ValueError(
                f"crop_pct is {self.crop_pct}; it must be above 0 and at most 2 (usually 0.8 to 1)"
            )
        if self.crop_mode not in CROP_MODES:
            raise ValueError(f"crop_mode is {self.crop_mode!r}; choose from {', '.join(CROP_MODES)}")

    @property
    def resize_size(self) -> int:
        """Pixels of the short side (squash: of both) before the centre crop, rounded down as in timm."""
        return math.floor(self.image_size / self.crop_pct)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; `from_dict` reads them back to an equal object."""
        return asdict(self) | {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """The object that `to_dict` was called on. Raises ValueError naming an unknown or missing key."""
        names = [field.name for field in fields(cls)]
        for key in values:
            if key not in names:
                near = difflib.get_close_matches(key, names, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(names)}"
                raise ValueError(f"preprocessing has an unknown key {key!r}; {hint}")
        missing = [name for name in ("image_size", "mean", "std") if name not in values]
        if missing:
            raise ValueError(f"preprocessing lacks {', '.join(missing)}")
        return cls(**values)


def _channels(name: str, values: Any) -> tuple[float, ...]:
    channels = tuple(float(value) for value in values)
    if not 1 <= len(channels) <= MAX_CHANNELS or not all(math.isfinite(value) for value in channels):
        raise ValueError(
            f"{name} is {channels}; it needs finite numbers, one per channel, of 1 to {MAX_CHANNELS} channels"
        )
    return channels
