"""RandAugment and random erasing of one picture, by numbers that a generator gives.

RandAugment (Cubuk et al. 2020, arXiv 1909.13719) is torchvision's: the same 14 operations, 31 levels and
`transforms.v2.functional` underneath; only the choice comes from the sample's own generator. Random erasing
(Zhong et al. 2017, arXiv 1708.04896) has torchvision's areas and ratios, and the mean colour as its value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch import Tensor

LEVELS = 31
OPERATIONS = (
    "identity",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "rotate",
    "brightness",
    "color",
    "contrast",
    "sharpness",
    "posterize",
    "solarize",
    "autocontrast",
    "equalize",
)
_SIGNED = OPERATIONS[1:10]
_ERASED_AREA, _ERASED_RATIO, _ATTEMPTS = (0.02, 0.33), (0.3, 3.3), 10


@dataclass(frozen=True)
class Stronger:
    """What a training picture goes through after crop and flip.

    operations: of RandAugment, 0 for none. level: their strength, 0 to 30. erase: probability of random
    erasing.
    """

    operations: int = 0
    level: int = 9
    erase: float = 0.0

    def picture(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Return an RGB picture after the operations that `rng` draws: two numbers for each."""
        for which, sign in rng.random((self.operations, 2)).tolist():
            name = OPERATIONS[int(which * len(OPERATIONS))]
            image = operate(image, name, self.level, is_negative=sign < 0.5)
        return image

    def view(self, view: Tensor, rng: np.random.Generator) -> Tensor:
        """Return a normalised view (3, h, w), in which a rectangle may be 0 now: the mean colour."""
        if self.erase and rng.random() < self.erase:
            top, left, height, width = erased_box(view.shape[-2], view.shape[-1], rng)
            view[:, top : top + height, left : left + width] = 0
        return view


def operate(image: Image.Image, name: str, level: int, *, is_negative: bool) -> Image.Image:
    """Return a picture after one operation at a level, 0 to 30; `is_negative` turns those with a sign."""
    # here, as most runs need no torchvision in their workers
    from torchvision.transforms.v2 import functional as F  # type: ignore[import-untyped]

    strength, sign = level / (LEVELS - 1), -1.0 if is_negative and name in _SIGNED else 1.0
    width, height = image.size

    def affine(
        *, translate: tuple[int, int] = (0, 0), shear: tuple[float, float] = (0.0, 0.0)
    ) -> Image.Image:
        # shears turn about the corner, as in the published code
        centre = [0.0, 0.0] if any(shear) else None
        moved: Image.Image = F.affine(
            image, angle=0.0, translate=list(translate), scale=1.0, shear=list(shear), center=centre
        )
        return moved

    shear = math.degrees(math.atan(sign * 0.3 * strength))
    factor = 1.0 + sign * 0.9 * strength
    changes: dict[str, Callable[[], Image.Image]] = {
        "identity": lambda: image,
        "shear_x": lambda: affine(shear=(shear, 0.0)),
        "shear_y": lambda: affine(shear=(0.0, shear)),
        "translate_x": lambda: affine(translate=(int(sign * 150 / 331 * width * strength), 0)),
        "translate_y": lambda: affine(translate=(0, int(sign * 150 / 331 * height * strength))),
        "rotate": lambda: F.rotate(image, sign * 30.0 * strength),
        "brightness": lambda: F.adjust_brightness(image, factor),
        "color": lambda: F.adjust_saturation(image, factor),
        "contrast": lambda: F.adjust_contrast(image, factor),
        "sharpness": lambda: F.adjust_sharpness(image, factor),
        "posterize": lambda: F.posterize(image, 8 - round(4 * strength)),
        "solarize": lambda: F.solarize(image, 255 * (1 - strength)),
        "autocontrast": lambda: F.autocontrast(image),
        "equalize": lambda: F.equalize(image),
    }
    return changes[name]()


def erased_box(height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Return (top, left, height, width) of a random rectangle; of no area where ten attempts do not fit."""
    low, high = (math.log(ratio) for ratio in _ERASED_RATIO)
    for _ in range(_ATTEMPTS):
        area_draw, ratio_draw, down, right = rng.random(4).tolist()
        area = height * width * (_ERASED_AREA[0] + (_ERASED_AREA[1] - _ERASED_AREA[0]) * area_draw)
        ratio = math.exp(low + (high - low) * ratio_draw)
        tall, wide = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if tall < height and wide < width:
            return int(down * (height - tall + 1)), int(right * (width - wide + 1)), tall, wide
    return 0, 0, 0, 0
