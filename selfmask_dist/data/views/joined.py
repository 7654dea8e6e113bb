"""The views of two transforms of one picture, one after the other. Knows neither loaders nor objectives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from selfmask_dist.data.views.single import Transform


@dataclass(frozen=True)
class Joined:
    """First the one view of `first`, then all of `second`; both draw from the sample's generator, in turn."""

    first: Transform
    second: Any  # a transform that may leave views to be finished, such as `MultiCrop`

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> tuple[Tensor, ...]:
        return *self.first(image, rng), *self.second(image, rng)

    @property
    def finish(self) -> Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] | None:
        """What the loader leaves to `Batch.to`."""
        rest = getattr(self.second, "finish", None)
        return None if rest is None else _FinishRest(rest)


@dataclass(frozen=True)
class _FinishRest:
    rest: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]

    def __call__(self, views: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return views[0], *self.rest(views[1:])
