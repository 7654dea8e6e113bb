"""A picture and its label map to a view and its map: what is cut out and mirrored is the same of both.

    view (3, size, size) float32, as `single` makes it
    map  (size, size) int64, IGNORED outside the picture

The picture is resized by the backbone's filter, its map by the nearest pixel, so that no class is invented.
Picklable, and without any global random state, as every transform.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from selfmask_dist.common.pictures import check_shape
from selfmask_dist.common.preprocessing import Preprocessing
from selfmask_dist.data.views.single import (
    centre_start,
    picture_to_tensor,
    random_crop_box,
    resample_filter,
    resized_size,
)

IGNORED = 255  # a pixel of a label map that does not count
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

    def pair(self, image: Image.Image, labels: Image.Image, rng: np.random.Generator) -> tuple[Tensor, ...]:
        """Return the view and the map, of a picture and a map of the same size."""
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


def read_label_map(data: bytes, size: tuple[int, int], num_classes: int) -> Image.Image:
    """Return a label map as one byte a pixel.

    Args:
        data: an encoded picture of grey or palette values; black and white ones are classes 0 and 1.
        size: of its picture, (width, height).

    Raises:
        ValueError: it cannot be decoded, is of another size, or has values that are no class.
    """
    try:
        with Image.open(io.BytesIO(data)) as opened:
            opened.load()
            labels = opened
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"its label map cannot be decoded ({error})") from error
    if labels.mode not in ("L", "P", "1"):
        raise ValueError(f"its label map is of PIL's mode {labels.mode}; it needs one byte a pixel (L or P)")
    if labels.size != size:
        raise ValueError(
            f"its label map has {labels.size[0]} x {labels.size[1]} pixels, and the picture "
            f"{size[0]} x {size[1]}"
        )
    values = np.asarray(labels).astype(np.uint8)
    if (bad := values[(values >= num_classes) & (values != IGNORED)]).size:
        raise ValueError(
            f"its label map has the value {int(bad[0])}, and there are {num_classes} classes (0 to "
            f"{num_classes - 1}; {IGNORED} is not counted)"
        )
    return Image.fromarray(values)
