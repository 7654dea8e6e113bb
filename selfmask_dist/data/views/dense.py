"""A picture and its label map to a view and its map: what is cut out and mirrored is the same of both.

    view (3, size, size) float32, as `single` makes it
    map  (size, size) int64, IGNORED outside the picture

The picture is resized by the backbone's filter, its map by the nearest pixel, so that no class is invented.
Picklable, and without any global random state, as every transform.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from selfmask_dist.common.pictures import IGNORED, ShapeError, check_shape
from selfmask_dist.common.preprocessing import Preprocessing
from selfmask_dist.data.views.single import (
    centre_start,
    picture_to_tensor,
    random_crop_box,
    resample_filter,
    resized_size,
)

_RATIO = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class DenseTransform:
    """Makes one view and its label map.

    crop_scale: of the random resized crop; None for the evaluation's resize and centre crop, which draws
        nothing. flip: mirror both with probability 1/2, where they are cropped at random.
    """

    pre: Preprocessing
    crop_scale: tuple[float, float] | None = None
    flip: bool = False

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> tuple[Tensor, ...]:
        """Return a view, and a map of which nothing counts."""
        return self.pair(image, Image.new("L", image.size, IGNORED), rng)

    def pair(self, image: Any, labels: Image.Image, rng: np.random.Generator) -> tuple[Tensor, ...]:
        """Return the view and the map, of a picture and a map of the same size."""
        if not isinstance(image, Image.Image):
            raise ShapeError("is no RGB picture of eight bits, and dense targets take no others yet")
        size = self.pre.image_size
        if self.crop_scale is None:
            wide, high = resized_size(self.pre, image.size)
            left, top = centre_start(wide, size), centre_start(high, size)
            image = image.resize((wide, high), resample_filter(self.pre))
            image = image.crop((left, top, left + size, top + size))
            whole = labels.resize((wide, high), Image.Resampling.NEAREST)
            labels = Image.new("L", (size, size), IGNORED)  # a crop would fill up with class 0
            labels.paste(whole, (-left, -top))
        else:
            check_shape(image.size)
            box = random_crop_box(image.size, scale=self.crop_scale, ratio=_RATIO, rng=rng)
            image = image.crop(box).resize((size, size), resample_filter(self.pre))
            labels = labels.crop(box).resize((size, size), Image.Resampling.NEAREST)
            if self.flip and rng.random() < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
                labels = labels.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        found = torch.from_numpy(np.array(labels, dtype=np.int64))
        return picture_to_tensor(image, self.pre), found
