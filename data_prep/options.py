"""What every converter can be told. Knows no layout and imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypedDict

SIMILAR = ("refuse", "merge", "keep")


class OptionValues(TypedDict, total=False):
    """The keyword arguments of every converter; see `ConversionOptions`."""

    max_samples_per_shard: int
    short_side: int | None
    quality: int
    skip_broken: bool
    overwrite: bool
    progress: bool
    num_workers: int
    similar_classes: str


@dataclass(frozen=True)
class ConversionOptions:
    """What every converter can be told.

    short_side: shrink larger pictures to this many pixels (Lanczos, encoded once more, JPEG of `quality`,
        1 to 95); None keeps the original bytes.
    skip_broken: list files that are no readable picture in `rejects.jsonl` and go on, instead of raising.
    overwrite: replace the tars that an earlier conversion left. progress: show a bar.
    num_workers: processes; changes no byte.
    similar_classes: what classes are whose names differ only by case, width or how a number is written:
        "refuse" names them and stops, "merge" makes them one, "keep" leaves them apart.
    """

    max_samples_per_shard: int = 5000
    short_side: int | None = None
    quality: int = 90
    skip_broken: bool = False
    overwrite: bool = False
    progress: bool = True
    num_workers: int = 1
    similar_classes: str = "refuse"

    @property
    def shape(self) -> dict[str, Any]:
        """The options that change what is written; a conversion goes on only under the same ones."""
        names = ("max_samples_per_shard", "short_side", "quality", "skip_broken")
        return {name: getattr(self, name) for name in names}

    def __post_init__(self) -> None:
        if self.max_samples_per_shard < 1:
            raise ValueError(f"max samples per shard is {self.max_samples_per_shard}; it must be at least 1")
        if self.short_side is not None and self.short_side < 1:
            raise ValueError(f"short side is {self.short_side}; it must be at least 1 pixel")
        if not 1 <= self.quality <= 95:
            raise ValueError(f"quality is {self.quality}; JPEG's goes from 1 to 95")
        if self.similar_classes not in SIMILAR:
            raise ValueError(f"similar classes is {self.similar_classes!r}; choose from {', '.join(SIMILAR)}")
