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
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from selfmask_dist.common.pictures import ShapeError, check_shape
from selfmask_dist.common.preprocessing import Preprocessing
from selfmask_dist.data.views.bands import Bands, view_of
from selfmask_dist.data.views.distortion import (
    COLOR,
    FACTORS,
    FLIP,
    GRAY,
    HAS_OPENCV,
    NUM_PARAMETERS,
    ORDER,
    SIGMA,
    distort_batch,
    distort_view,
)
from selfmask_dist.data.views.single import Transform, crop_box, size_of

_DRAWS = 40  # uniforms for each view; a later parameter takes a column that is still free


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
    """Makes the views that `multicrop_transform` describes."""

    crops: tuple[Crops, ...]
    distortion: Distortion
    interpolation: str
    finisher: FinishViews
    on_device: bool

    @property
    def finish(self) -> Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] | None:
        """What the loader leaves to `Batch.to`; None where nothing is left to do."""
        return self.finisher if self.on_device and len(self.finisher.mean) == 3 else None

    @property
    def channels(self) -> int:
        """Return how many channels a picture has here."""
        return len(self.finisher.mean)

    def __call__(self, image: Image.Image | Bands, rng: np.random.Generator) -> tuple[Tensor, ...]:
        check_shape(size_of(image))
        sizes = [group for group in self.crops for _ in range(group.count)]
        draws = rng.random((len(sizes), _DRAWS))
        if len(self.finisher.mean) != 3:
            return tuple(self._of_bands(image, group, u) for group, u in zip(sizes, draws, strict=True))
        if not isinstance(image, Image.Image):
            raise ShapeError("is no RGB picture of eight bits, which crops of three channels are made of")
        # channels last, as pictures are decoded: resizing that way takes half the time
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        views = []
        for group, u in zip(sizes, draws, strict=True):
            left, top, right, bottom = crop_box(image.size, scale=group.scale, ratio=(3 / 4, 4 / 3), u=u)
            crop = pixels[:, :, top:bottom, left:right].contiguous(memory_format=torch.channels_last)
            views.append(
                F.interpolate(crop, (group.size, group.size), mode=self.interpolation, antialias=True)
            )
        parameters = torch.from_numpy(draw_parameters(self.distortion, draws))
        if self.on_device:
            return *(view[0].contiguous() for view in views), parameters
        return tuple(view[0] for view in self.finisher((*views, parameters[None])))

    def _of_bands(self, image: Image.Image | Bands, group: Crops, u: npt.NDArray[np.float64]) -> Tensor:
        """Return a crop of other than three channels: mirrored, its colours and sharpness as they are."""
        box = crop_box(size_of(image), scale=group.scale, ratio=(3 / 4, 4 / 3), u=u)
        pre = Preprocessing(group.size, self.finisher.mean, self.finisher.std, self.interpolation)
        flip = bool(draw_parameters(self.distortion, u[None])[0, FLIP])
        return view_of(image, pre, box=box, resized=(group.size, group.size), flip=flip)


def multicrop_transform(
    pre: Preprocessing,
    *,
    crops: tuple[Crops, ...] = SWAV_CROPS,
    distortion: Distortion | None = None,
    interpolation: str = "bilinear",
    on_device: bool = False,
) -> MultiCrop:
    """Return a transform to several distorted random crops, normalised as `pre` says.

    The distribution is that of torchvision's transforms.

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
    """Return the distortions of views, (views, 12) as in `distortion`, from uniforms `u`, (views, 40)."""
    d = distortion
    strength = np.array([d.brightness, d.contrast, d.saturation])
    low = np.maximum(0, 1 - strength)
    found = np.empty((len(u), NUM_PARAMETERS), dtype=np.float32)
    found[:, FLIP], found[:, COLOR], found[:, GRAY] = u[:, 22] < d.flip, u[:, 23] < d.color, u[:, 32] < d.gray
    found[:, ORDER] = np.argsort(u[:, 24:28])
    found[:, FACTORS][:, :3] = low + (1 + strength - low) * u[:, 28:31]
    found[:, FACTORS][:, 3] = d.hue * (2 * u[:, 31] - 1)
    found[:, SIGMA] = (d.sigma[0] + (d.sigma[1] - d.sigma[0]) * u[:, 34]) * (u[:, 33] < d.blur)
    return found


@dataclass(frozen=True)
class FinishViews:
    """Turns uint8 crops into float32 views: flips, distorts and normalises each row by its parameters.

    The last of the tensors that it is called with holds the parameters, (rows, views, 12), on the CPU.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, views: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        *crops, parameters = views
        finish = self.one_by_one if crops[0].device.type == "cpu" else self.at_once
        found: list[Tensor] = list(crops)
        for size in sorted({crop.shape[-1] for crop in crops}):
            same = [v for v, crop in enumerate(crops) if crop.shape[-1] == size]
            rows = torch.cat([parameters[:, v] for v in same])
            done = finish(torch.cat([crops[v] for v in same]), rows).chunk(len(same))
            for v, view in zip(same, done, strict=True):
                found[v] = view
        return tuple(found)

    def at_once(self, crops: Tensor, parameters: Tensor) -> Tensor:
        """Finish all crops of one size in few calls, as a device wants it.

        crops: (n, 3, size, size) uint8. parameters: (n, 12). Returns (n, 3, size, size) float32.
        """
        images = distort_batch(crops.float().div_(255), parameters)
        for channel, (mean, std) in enumerate(zip(self.mean, self.std, strict=True)):
            images[:, channel].sub_(mean).div_(std)  # numbers go along with the call: nothing is copied
        return images

    def one_by_one(self, crops: Tensor, parameters: Tensor) -> Tensor:
        """Finish crops one after the other, as a processor wants it; the same pixels up to rounding."""
        if not HAS_OPENCV:
            rows = zip(crops.split(1), parameters.split(1), strict=True)
            return torch.cat([self.at_once(crop, row) for crop, row in rows])
        found = torch.empty(crops.shape)
        mean, std = self._statistics(found)
        for crop, row, view in zip(crops, parameters.tolist(), found, strict=True):
            distort_view(crop.float().mul_(1 / 255), row, out=view)
            view.sub_(mean).div_(std)
        return found

    def _statistics(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images.new_tensor(self.mean)[:, None, None], images.new_tensor(self.std)[:, None, None]


@dataclass(frozen=True)
class Joined:
    """Gives the one view of `first`, then all of `second`; both draw from the sample's generator."""

    first: Transform
    second: Any  # a transform that may leave views to be finished, such as `MultiCrop`

    @property
    def channels(self) -> int:
        """Return how many channels a picture has here."""
        return getattr(self.first, "channels", 3)

    def __call__(self, image: Image.Image | Bands, rng: np.random.Generator) -> tuple[Tensor, ...]:
        return *self.first(image, rng), *self.second(image, rng)

    @property
    def finish(self) -> Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] | None:
        """What the loader leaves to `Batch.to`; None where nothing is left to do."""
        rest = getattr(self.second, "finish", None)
        return None if rest is None else _FinishRest(rest)


@dataclass(frozen=True)
class _FinishRest:
    rest: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]

    def __call__(self, views: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return views[0], *self.rest(views[1:])
