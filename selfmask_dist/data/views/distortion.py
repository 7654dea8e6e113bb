"""SwAV's distortions for given parameters: flip, colours, grey and blur of float32 images in 0..1.

Knows neither crops, loaders nor random numbers. A view's parameters are a row of 12 numbers,

    (flip, colour on, order of the four colour operations, their factors, grey, sigma of the blur),

and there are two drivers: `distort_batch` does many images in few calls, each by its own row, as a device
wants it; `distort_view` does one with OpenCV, whose calls fuse what torch does in ten, and which stays in a
processor's cache. Both give the same pixels up to rounding (1e-5).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import cv2

    cv2.setNumThreads(0)  # the loader's workers are the parallelism
    HAS_OPENCV = True
except ImportError:  # an optional dependency: selfmask_dist[fast]
    HAS_OPENCV = False

# columns of a view's parameters
FLIP, COLOR, ORDER, FACTORS, GRAY, SIGMA = 0, 1, slice(2, 6), slice(6, 10), 10, 11
NUM_PARAMETERS = 12
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)  # torchvision's numbers
_LUMA = (0.2989, 0.587, 0.114)
_BLUR_RADIUS = 6  # pixels: three of the largest sigma


def distort_batch(images: Tensor, parameters: Tensor) -> Tensor:
    """Distort each image by its own row of parameters, and return the images.

    images: (n, 3, h, w) float32 in 0..1, may be changed. parameters: (n, 12), on the CPU, where it is read
        which rows take which step: of a device each such question would wait for all that it has to do. From
        another device they are fetched.
    """
    parameters = parameters.cpu()
    is_colored, orders = parameters[:, COLOR] > 0.5, parameters[:, ORDER].long()
    steps = [
        is_colored & ((orders[:, turn] == _HUE) == is_hue) for turn in range(4) for is_hue in (False, True)
    ]
    steps += [parameters[:, GRAY] > 0.5, parameters[:, SIGMA] > 0]
    numbers = [step.nonzero()[:, 0] for step in steps]
    places = _send(torch.cat(numbers), images.device).split([len(rows) for rows in numbers])
    parameters = _send(parameters, images.device)
    orders, factors = parameters[:, ORDER].long(), parameters[:, FACTORS]
    images = torch.where(parameters[:, FLIP, None, None, None] > 0.5, images.flip(-1), images)
    for turn in range(4):
        rows = places[2 * turn]
        if len(rows):
            operation = orders[rows, turn]
            factor = factors[rows].gather(1, operation[:, None])[:, :, None, None]
            images[rows] = _blend(images[rows], operation[:, None, None, None], factor)
        rows = places[2 * turn + 1]
        if len(rows):
            images[rows] = _shift_hue(images[rows], factors[rows, _HUE])
    gray, blurred = places[-2:]
    if len(gray):
        images[gray] = _luma(images[gray]).expand(-1, 3, -1, -1)
    if len(blurred):
        images[blurred] = _blur(images[blurred], parameters[blurred, SIGMA])
    return images


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a CPU tensor on a device, without waiting for what the device does now."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _blend(images: Tensor, operation: Tensor, factor: Tensor) -> Tensor:
    """Return factor * image + (1 - factor) * base.

    The base is black for brightness, the mean grey for contrast, and the grey image for saturation.
    """
    gray = _luma(images)
    base = torch.where(operation == _CONTRAST, gray.mean(dim=(-2, -1), keepdim=True), gray)
    return (factor * images + (1 - factor) * base * (operation != _BRIGHTNESS)).clamp_(0, 1)


def _luma(images: Tensor) -> Tensor:
    return _LUMA[0] * images[:, 0:1] + _LUMA[1] * images[:, 1:2] + _LUMA[2] * images[:, 2:3]


def _shift_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by shift (n,), in turns, between the same greatest (M) and least (m) channel.

    With C = M - m and hue h in -3..3 around red, going once around the six edges of the colour hexagon gives

        C |h| = G + B - R + M - 2m,  its sign that of G - B,

    and a channel whose complement lies at c (R 3, G -1, B 1) is M - C * clamp(2 - distance(h, c), 0, 1) on
    the circle of 6. This is the way through HSV and back, without its divisions and cases.
    """
    red, green, blue = images.split(1, dim=1)
    high, low = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    spread = high - low
    hue = (green + blue - red + high - 2 * low).copysign(green - blue)
    center = _send(torch.tensor([3.0, -1.0, 1.0], dtype=shift.dtype), shift.device) - 6 * shift[:, None]
    center -= 6 * (center / 6).round()  # to -3..3, so that no difference to a hue is beyond 6
    # 2 - distance = | |h - center| - 3 | - 1
    ramp = ((hue - spread * center[:, :, None, None]).abs() - 3 * spread).abs()
    return high + spread - torch.minimum(torch.maximum(ramp, spread), 2 * spread)


def _blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Blur each image by a Gaussian of its own width, rows, then columns; edges repeat their last pixel."""
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


def distort_view(view: Tensor, parameters: Sequence[float], *, out: Tensor) -> None:
    """Distort one view with OpenCV, which must be installed, and write the result to `out`.

    view: (3, h, w) float32 in 0..1, may be changed; fastest where its channels are last in memory.
    parameters: its 12 numbers. out: (3, h, w) float32, contiguous.
    """
    image = view.permute(1, 2, 0).contiguous().numpy()
    if parameters[FLIP] > 0.5:
        image = cv2.flip(image, 1)
    if parameters[COLOR] > 0.5:
        factors = parameters[FACTORS]
        for operation in map(int, parameters[ORDER]):
            image = _recolor(image, operation, factors[operation])
    if parameters[GRAY] > 0.5:
        image = cv2.transform(image, _ALL_LUMA)
    if parameters[SIGMA] > 0:
        size = 2 * _BLUR_RADIUS + 1
        image = cv2.GaussianBlur(image, (size, size), parameters[SIGMA], borderType=cv2.BORDER_REPLICATE)
    cv2.split(image, list(out.numpy()))


_ALL_LUMA = np.tile(np.array(_LUMA, dtype=np.float32), (3, 1))


def _recolor(image: npt.NDArray[np.float32], operation: int, factor: float) -> npt.NDArray[np.float32]:
    """Do one of the four colour operations; all but hue are an affine map of each pixel, clamped."""
    if operation == _HUE:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hue = hsv[..., 0]  # degrees
        hue += np.float32(360 * (factor % 1))  # the way back takes hues above 360, not below 0
        return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB, dst=image)
    if operation == _SATURATION:
        matrix = factor * np.eye(3, dtype=np.float32) + np.float32(1 - factor) * _ALL_LUMA
        image = cv2.transform(image, matrix)
    else:
        # the mean over all pixels of grey is the grey of the means
        base = np.dot(_LUMA, cv2.mean(image)[:3]) if operation == _CONTRAST else 0.0
        image *= np.float32(factor)
        image += np.float32((1 - factor) * base)
    # a mean of two images in 0..1 stays there
    return image if factor <= 1 else np.clip(image, 0, 1, out=image)
