"""Pictures to views: the evaluation view and the training view of one sample.

Knows neither sources nor loaders nor any global random state: a transform is a picklable function
(PIL image, generator) -> views, each view float32 of shape (3, image_size, image_size),

    view[c] = (pixels[c] / 255 - mean[c]) / std[c].

PIL is called directly. The pixels equal torchvision's transforms on PIL images bit for bit, and a loader
worker that need not import torchvision starts in less than half the time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from selfmask_dist.common.pictures import ShapeError, check_shape
from selfmask_dist.common.preprocessing import Preprocessing
from selfmask_dist.data.views.stronger import Stronger

MAX_RESIZED = 2**26  # pixels of the resized picture, before its centre is cut out: 256 MB while it exists
Transform = Callable[[Image.Image, np.random.Generator], tuple[Tensor, ...]]


def eval_transform(pre: Preprocessing) -> Transform:
    """Resize, centre crop, normalise: one view, equal to timm's evaluation transform; draws nothing.

    The view raises ShapeError for a picture whose sides differ more than `common.pictures.MAX_ASPECT` times,
    or that would have more than `MAX_RESIZED` pixels once its short side is resized.
    """
    return EvalTransform(pre)


def train_transform(
    pre: Preprocessing,
    *,
    crop_scale: tuple[float, float] = (0.2, 1.0),
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: bool = True,
    stronger: Stronger | None = None,
) -> Transform:
    """Return the transform to one random resized crop, flipped with probability 1/2, drawn as torchvision's.

    crop_scale: range of the crop's area as a fraction of the picture's. crop_ratio: range of width / height.
    flip: False where mirrored pictures mean something else (digits, text).
    stronger: changes beyond crop and flip, whose draws come after theirs.
    Raises ValueError for an empty range. Source: Szegedy et al., arXiv 1409.4842, section 6.
    """
    if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
        raise ValueError(
            f"crop_scale is {crop_scale}; it must be a range (low, high) inside 0..1, low above 0"
        )
    if not 0 < crop_ratio[0] <= crop_ratio[1]:
        raise ValueError(f"crop_ratio is {crop_ratio}; it must be a range (low, high) above 0")
    return TrainTransform(pre, crop_scale, crop_ratio, flip, stronger)


def resized_size(pre: Preprocessing, size: tuple[int, int]) -> tuple[int, int]:
    """Return the (width, height) that a picture of `size` is resized to before its centre is cut out.

    Raises:
        ShapeError: it is too long and thin, or would have more than `MAX_RESIZED` pixels.
    """
    check_shape(size)  # before the work, which grows with the ratio of the sides
    (width, height), short = size, pre.resize_size
    if pre.crop_mode == "squash":
        width, height = short, short
    elif width <= height:
        width, height = short, int(short * height / width)
    else:
        width, height = int(short * width / height), short
    if width * height > MAX_RESIZED:
        raise ShapeError(
            f"is {size[0]} x {size[1]} pixels and would be resized to {width} x {height}, more"
            f" than {MAX_RESIZED:,}; cut or resize it"
        )
    return width, height


@dataclass(frozen=True)
class EvalTransform:
    """Makes the view of `eval_transform`. It is no closure because worker processes receive it by pickle."""

    pre: Preprocessing

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> tuple[Tensor, ...]:
        size = self.pre.image_size
        width, height = resized_size(self.pre, image.size)
        image = image.resize((width, height), resample_filter(self.pre))
        left, top = centre_start(width, size), centre_start(height, size)
        return (picture_to_tensor(image.crop((left, top, left + size, top + size)), self.pre),)


@dataclass(frozen=True)
class TrainTransform:
    """Makes the view of `train_transform`."""

    pre: Preprocessing
    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    flip: bool
    stronger: Stronger | None = None

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> tuple[Tensor, ...]:
        check_shape(image.size)
        size = self.pre.image_size
        box = random_crop_box(image.size, scale=self.crop_scale, ratio=self.crop_ratio, rng=rng)
        # crop, then resize: `resize(box=...)` would let pixels outside the box into the filter's support
        image = image.crop(box).resize((size, size), resample_filter(self.pre))
        if self.flip and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.stronger is None:
            return (picture_to_tensor(image, self.pre),)
        return (self.stronger.view(picture_to_tensor(self.stronger.picture(image, rng), self.pre), rng),)


def random_crop_box(
    size: tuple[int, int], *, scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Return a random crop (left, top, right, bottom) of a (width, height) picture, in pixels.

    The distribution is `torchvision.transforms.RandomResizedCrop.get_params`'s: area uniform, aspect ratio
    log-uniform, ten attempts, then the largest central crop inside the ratio range. Draws only uniform
    doubles, whose stream is the least likely of numpy's to change.
    """
    return _crop_box(size, scale, ratio, rng.random, rng.random)


def crop_box(
    size: tuple[int, int],
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    u: npt.NDArray[np.float64],
) -> tuple[int, int, int, int]:
    """Return what `random_crop_box` does, from at least 22 uniforms: ten attempts of two, and the place."""
    draws = iter(u[:20].tolist())
    place = iter(u[20:22].tolist())
    return _crop_box(size, scale, ratio, lambda: next(draws), lambda: next(place))


def _crop_box(
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    draw: Callable[[], float],
    place: Callable[[], float],
) -> tuple[int, int, int, int]:
    width, height = size
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = width * height * (scale[0] + (scale[1] - scale[0]) * draw())
        aspect = math.exp(log_low + (log_high - log_low) * draw())
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(place() * (height - h + 1))
            left = int(place() * (width - w + 1))
            return left, top, left + w, top + h
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def resample_filter(pre: Preprocessing) -> Image.Resampling:
    """Return PIL's name of the backbone's filter."""
    return Image.Resampling[pre.interpolation.upper()]


def centre_start(length: int, size: int) -> int:
    """Return where a centred window of `size` pixels starts; below 0 (black padding) in a smaller picture."""
    return round((length - size) / 2) if length >= size else -((size - length) // 2)


def picture_to_tensor(image: Image.Image, pre: Preprocessing) -> Tensor:
    """Return a picture as a normalised view (3, height, width)."""
    # torchvision's ToTensor and Normalize: the same float32 operations in the same order, in half their time
    pixels = np.asarray(image).transpose(2, 0, 1).astype(np.float32, order="C")
    pixels /= np.float32(255)
    pixels -= np.array(pre.mean, dtype=np.float32)[:, None, None]
    pixels /= np.array(pre.std, dtype=np.float32)[:, None, None]
    return torch.from_numpy(pixels)
