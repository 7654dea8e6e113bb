"""SwAV's multi-crop: several random crops of one picture, distorted in colour and blurred.

Knows neither loaders nor objectives. All parameters of view v are row v of one table of uniform draws,

    u = generator(seed, epoch, sample).random((views, 40)),

so they are a function of (seed, epoch, sample, view). Cropping and resizing give uint8 on the CPU; the rest,
`FinishViews`, works on batches with parameters per sample, on whatever device the batch is on: a worker runs
it for one sample (`on_device=False`), or `Batch.to` for the whole batch. Both give the same pixels.
Source: Caron et al., arXiv 2006.09882, and its colour distortion from SimCLR, arXiv 2002.05709, appendix A.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from selfmask_dist.data.views import crop_box
from selfmask_dist.preprocessing import Preprocessing

_DRAWS = 40  # uniforms for each view; a later parameter takes a column that is still free
_BLUR_RADIUS = 6  # pixels: three of the largest sigma
# columns of a view's parameters
_FLIP, _COLOR, _ORDER, _FACTORS, _GRAY, _SIGMA = 0, 1, slice(2, 6), slice(6, 10), 10, 11
_NUM_PARAMETERS = 12
_HUE = 3  # place among (brightness, contrast, saturation, hue)


@dataclass(frozen=True)
class Crops:
    """`count` views of `size` pixels, each a crop of `scale`, a range of shares of the area."""

    count: int
    size: int
    scale: tuple[float, float]


SWAV_CROPS = (Crops(2, 224, (0.14, 1.0)), Crops(6, 96, (0.05, 0.14)))


@dataclass(frozen=True)
class Distortion:
    """Strengths and probabilities of SwAV's distortions.

    brightness, contrast, saturation: factors from 1 - x (at least 0) to 1 + x. hue: shifts from -x to x, in
    turns. sigma: range of the blur, pixels.
    """

    flip: float = 0.5
    color: float = 0.8
    brightness: float = 0.8
    contrast: float = 0.8
    saturation: float = 0.8
    hue: float = 0.2
    gray: float = 0.2
    blur: float = 0.5
    sigma: tuple[float, float] = (0.1, 2.0)


@dataclass(frozen=True)
class MultiCrop:
    """See `multicrop_transform`."""

    crops: tuple[Crops, ...]
    distortion: Distortion
    interpolation: str
    finisher: FinishViews
    on_device: bool

    @property
    def finish(self) -> Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] | None:
        """What the loader leaves to `Batch.to`."""
        return self.finisher if self.on_device else None

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> tuple[Tensor, ...]:
        sizes = [group for group in self.crops for _ in range(group.count)]
        draws = rng.random((len(sizes), _DRAWS))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        views = []
        for group, u in zip(sizes, draws, strict=True):
            left, top, right, bottom = crop_box(image.size, scale=group.scale, ratio=(3 / 4, 4 / 3), u=u)
            crop = pixels[:, :, top:bottom, left:right]
            shape = (group.size, group.size)
            views.append(F.interpolate(crop, shape, mode=self.interpolation, antialias=True)[0].contiguous())
        parameters = torch.from_numpy(np.stack([draw_parameters(self.distortion, u) for u in draws]))
        if self.on_device:
            return *views, parameters
        finished = self.finisher(tuple(view[None] for view in (*views, parameters)))
        return tuple(view[0] for view in finished)


def multicrop_transform(
    pre: Preprocessing,
    *,
    crops: tuple[Crops, ...] = SWAV_CROPS,
    distortion: Distortion | None = None,
    interpolation: str = "bilinear",
    on_device: bool = False,
) -> MultiCrop:
    """Several distorted random crops, normalised as `pre` says; torchvision's distribution.

    on_device: leave flips, colours, blur and normalisation to the device. The loader's views are then uint8,
        a quarter of the bytes, and `Batch.to` finishes them.
    Raises ValueError for an empty range of scales.
    """
    for group in crops:
        if not 0 < group.scale[0] <= group.scale[1] <= 1:
            raise ValueError(f"crop scale is {group.scale}; it must be a range inside 0..1, low above 0")
        if group.count < 1 or group.size < 1:
            raise ValueError(f"{group.count} crops of {group.size} pixels; both must be at least 1")
    return MultiCrop(
        crops, distortion or Distortion(), interpolation, FinishViews(pre.mean, pre.std), on_device
    )


def draw_parameters(distortion: Distortion, u: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """A view's distortion from its row of uniforms: flip, colour on, order (4), factors (4), gray, sigma
    (0 = no blur).
    """
    d = distortion
    strength = np.array([d.brightness, d.contrast, d.saturation])
    low = np.maximum(0, 1 - strength)
    found = np.zeros(_NUM_PARAMETERS, dtype=np.float32)
    found[_FLIP], found[_COLOR], found[_GRAY] = u[22] < d.flip, u[23] < d.color, u[32] < d.gray
    found[_ORDER] = np.argsort(u[24:28])
    found[_FACTORS] = *(low + (1 + strength - low) * u[28:31]), d.hue * (2 * u[31] - 1)
    found[_SIGMA] = (d.sigma[0] + (d.sigma[1] - d.sigma[0]) * u[34]) * (u[33] < d.blur)
    return found


@dataclass(frozen=True)
class FinishViews:
    """uint8 crops, and last their parameters (rows, views, 12), to float32 views: flipped, distorted and
    normalised, each row by its own parameters.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, views: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        *crops, parameters = views
        found: list[Tensor] = list(crops)
        for size in sorted({crop.shape[-1] for crop in crops}):
            same = [v for v, crop in enumerate(crops) if crop.shape[-1] == size]
            images = torch.cat([crops[v] for v in same]).float().div_(255)
            rows = torch.cat([parameters[:, v] for v in same])
            done = self._normalize(distort(images, rows)).chunk(len(same))
            for v, view in zip(same, done, strict=True):
                found[v] = view
        return tuple(found)

    def _normalize(self, images: Tensor) -> Tensor:
        mean, std = images.new_tensor(self.mean), images.new_tensor(self.std)
        return (images - mean[:, None, None]) / std[:, None, None]


def distort(images: Tensor, parameters: Tensor) -> Tensor:
    """Flip, colour, grey and blur (n, 3, h, w) float32 images in 0..1 by their rows of (n, 12) parameters."""
    per_row = parameters[:, :, None, None, None]
    images = torch.where(per_row[:, _FLIP] > 0.5, images.flip(-1), images)
    is_colored = parameters[:, _COLOR] > 0.5
    orders, factors = parameters[:, _ORDER].long(), parameters[:, _FACTORS]
    for turn in range(4):
        operation = orders[:, turn]
        rows = (is_colored & (operation != _HUE)).nonzero()[:, 0]
        if len(rows):
            factor = factors[rows].gather(1, operation[rows, None])[:, :, None, None]
            images[rows] = _blend(images[rows], operation[rows], factor)
        rows = (is_colored & (operation == _HUE)).nonzero()[:, 0]
        if len(rows):
            images[rows] = _shift_hue(images[rows], factors[rows, _HUE])
    rows = (parameters[:, _GRAY] > 0.5).nonzero()[:, 0]
    if len(rows):
        images[rows] = _luma(images[rows]).expand(-1, 3, -1, -1)
    rows = (parameters[:, _SIGMA] > 0).nonzero()[:, 0]
    if len(rows):
        images[rows] = _blur(images[rows], parameters[rows, _SIGMA])
    return images


def _blend(images: Tensor, operation: Tensor, factor: Tensor) -> Tensor:
    """factor * image + (1 - factor) * base: black for brightness, the mean grey for contrast, grey for
    saturation.
    """
    operation = operation[:, None, None, None]
    gray = _luma(images)
    base = torch.where(operation == 1, gray.mean(dim=(-2, -1), keepdim=True), gray) * (operation > 0)
    return (factor * images + (1 - factor) * base).clamp_(0, 1)


def _luma(images: Tensor) -> Tensor:
    return 0.2989 * images[:, 0:1] + 0.587 * images[:, 1:2] + 0.114 * images[:, 2:3]


def _shift_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Through hue, saturation and value: shift (n,) in turns."""
    red, green, blue = images.unbind(1)
    high, low = images.amax(1), images.amin(1)
    spread = high - low
    safe = torch.where(spread > 0, spread, torch.ones_like(spread))
    hue = torch.where(
        high == red,
        (green - blue) / safe,
        torch.where(high == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    hue = (hue + 6 * shift[:, None, None]) % 6
    # value - spread * clamp(min(k, 4 - k), 0, 1), with k = (5, 3, 1) + hue modulo 6: RGB in closed form
    k = (images.new_tensor([5.0, 3.0, 1.0])[:, None, None] + hue[:, None]) % 6
    return high[:, None] - spread[:, None] * torch.minimum(k, 4 - k).clamp_(0, 1)


def _blur(images: Tensor, sigma: Tensor) -> Tensor:
    """A Gaussian of its own width for each image, rows and then columns; edges repeat their last pixel."""
    reach = torch.arange(_BLUR_RADIUS + 1, device=images.device, dtype=images.dtype)
    weights = torch.exp(-0.5 * (reach / sigma[:, None]) ** 2)
    weights = weights / (weights[:, :1] + 2 * weights[:, 1:].sum(1, keepdim=True))
    taps = weights[:, :, None, None, None]
    r = _BLUR_RADIUS
    for dim, pad in ((-1, (r, r, 0, 0)), (-2, (0, 0, r, r))):
        length = images.shape[dim]
        padded = F.pad(images, pad, mode="replicate")
        images = padded.narrow(dim, r, length) * taps[:, 0]
        for k in range(1, r + 1):
            images += (padded.narrow(dim, r - k, length) + padded.narrow(dim, r + k, length)) * taps[:, k]
    return images
