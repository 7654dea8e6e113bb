"""The threshold mask: pure tensor functions, elementwise on whatever piece of a tensor the caller holds.

For N frozen weights W, scores S (float32, same shape) and a threshold mu:

    M = 1[S > mu]        a = (N / sum M)^(1/2)        theta = a * W * M        (paper eq. 1; a = 1 / alpha)

With G = dL/dtheta, the straight-through estimator dL/dS := dL/dM, and the scale `a` inside the graph:

    dL/dS = a * G * W - <G, theta> / (2 * sum M)                               (*)

The second term is one number per scaled tensor. `scale="detached"` leaves it out; `scale="none"` also fixes
a = 1 (Piggyback, Mallya et al. 2018). An all-zero mask would make `a` infinite: `scale_factor` divides by
max(sum M, 1), so theta is exactly zero and every gradient stays finite.

Knows nothing of modules, names, files, optimizers or process groups.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Scale = Literal["through", "detached", "none"]
ScoreStep = Literal["plain", "rms"]

HALVES = (torch.bfloat16, torch.float16)

# of the largest tensor's gradient: below lies the rounding of gradients that are zero, see `step_factors`
_NOISE = 1e-5

# float32 adds ones exactly up to 2^24; larger tensors are counted in float64
_EXACT_FLOAT32_COUNT = 2**24


def binarize(scores: Tensor, threshold: float) -> Tensor:
    """Return the mask M = 1[S > mu] as bools, in the shape of `scores`."""
    return scores > threshold


def scale_factor(num_kept: Tensor, numel: int | Tensor, dtype: torch.dtype) -> Tensor:
    """Return the scale a = (N / sum M)^(1/2) in `dtype` (paper eq. 1), of one segment or a vector of them.

    `num_kept`: sum M over the whole scaled tensor; `numel`: N of the whole scaled tensor.
    """
    kept = num_kept.double().clamp(min=1)
    # torch.div: a plain number over a tensor would be rounded twice, as the reciprocal times the number
    return torch.div(torch.as_tensor(numel, dtype=kept.dtype, device=kept.device), kept).sqrt().to(dtype)


def count_kept(mask: Tensor) -> Tensor:
    """Return sum M as a 0-d float64 tensor, exactly; `mask` holds bools or floats that are 0 or 1."""
    if mask.dtype in (torch.float32, *HALVES) and mask.numel() < _EXACT_FLOAT32_COUNT:
        return mask.sum(dtype=torch.float32).double()
    return mask.sum(dtype=torch.float64)


def scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the scale a of a theta of `dtype`: its own, or float32 where that is a half."""
    return torch.float32 if dtype in HALVES else dtype


def multiply(theta: Tensor, scale: Tensor) -> None:
    """Multiply theta by the scale a, in place; in half precision the product is rounded, and not a."""
    if theta.dtype in HALVES and theta.device.type != "cpu":  # there a number on the device is rounded first
        theta.copy_(theta.float() * scale)
    else:
        theta.mul_(scale)


def write_mask(scores: Tensor, threshold: float, *, out: Tensor) -> Tensor:
    """Write M as zeros and ones into `out` (the storage of theta) and return sum M (0-d float64).

    A float mask in theta's own storage costs no memory, and on a CPU a fifth of the time of a bool mask.
    """
    torch.gt(scores, threshold, out=out)
    return count_kept(out)


def finish_theta(theta: Tensor, weight: Tensor, scale: Tensor | None) -> None:
    """Turn the zeros and ones that `write_mask` left in `theta` into theta = a * W * M, in place."""
    theta.mul_(weight)
    if scale is not None:
        multiply(theta, scale)


def materialize(weight: Tensor, mask: Tensor, *, scaled: bool = True) -> Tensor:
    """Return theta = a * W * M of one whole tensor (paper eq. 1), new, and bit-equal to the trained one.

    Args:
        weight: frozen W.
        mask: bools, the shape of `weight`.
        scaled: False for a = 1 (Piggyback).
    """
    theta = mask.to(weight.dtype)
    num_kept = count_kept(mask)
    finish_theta(theta, weight, scale_factor(num_kept, weight.numel(), weight.dtype) if scaled else None)
    return theta


def inner_product(grad: Tensor, theta: Tensor) -> Tensor:
    """Return <G, theta> over the piece at hand, 0-d; pieces of one tensor add up."""
    if grad.dtype in HALVES:
        grad, theta = grad.float(), theta.float()
    if grad.is_contiguous() and theta.is_contiguous():
        return torch.dot(grad.view(-1), theta.view(-1))  # one pass, no temporary
    return (grad * theta).sum()


def shift_of(grad_dot_theta: Tensor, num_kept: Tensor) -> Tensor:
    """Return the second term of formula (*), one number for the whole tensor, 0-d."""
    return grad_dot_theta / (-2 * num_kept.clamp(min=1))


def pullback(
    grad: Tensor,
    weight: Tensor,
    *,
    scale: Tensor | None,
    grad_dot_theta: Tensor | None,
    num_kept: Tensor,
    out: Tensor,
) -> Tensor:
    """Write dL/dS of formula (*) for the piece at hand into `out` and return it.

    Args:
        grad: G = dL/dtheta.
        weight: frozen W, the shape of `grad`.
        scale: a, 0-d; None for a = 1.
        grad_dot_theta: <G, theta> over the whole tensor, 0-d; None leaves the second term out.
        num_kept: sum M over the whole tensor, 0-d.
        out: float32 (float64 for float64 weights), the shape of `grad`.
    """
    grad = grad.to(out.dtype)
    shift = None if grad_dot_theta is None else shift_of(grad_dot_theta, num_kept).to(out.dtype)
    if out.device.type == "cpu":  # one pass instead of three; reading a scalar stops nothing there
        factor = 1.0 if scale is None else scale.item()
        shift = out.new_zeros(()) if shift is None else shift
        return torch.addcmul(shift, grad, weight.to(out.dtype), value=factor, out=out)
    torch.mul(grad, weight, out=out)
    if scale is not None:
        out.mul_(scale)
    return out if shift is None else out.add_(shift)


def sum_of_squares(grad: Tensor) -> Tensor:
    """Return the sum of squares over the piece at hand, 0-d float64; pieces of one tensor add up."""
    return torch.linalg.vector_norm(grad, dtype=torch.float64).square()


def step_factors(mean_squares: Tensor) -> Tensor:
    """Return what each gradient is to be multiplied by so that its root mean square is one, 1-D float64.

    This is the score step `rms`: g <- g / sqrt(mean(g^2)), the mean over the whole tensor. The factor of a
    gradient of zeros is 0. Some gradients are zero but for rounding (a key's bias changes nothing in a
    softmax, a bias before batch normalisation nothing either), and dividing by their own size would make
    steps of noise that differ with the number of processes. So nothing is divided by less than a
    hundred-thousandth of the largest tensor's root mean square.

    Args:
        mean_squares: mean(g^2) of each tensor, 1-D float64.
    """
    sizes = mean_squares.clamp(min=0).sqrt()
    return torch.where(sizes > 0, torch.maximum(sizes, _NOISE * sizes.max()).reciprocal(), 0.0)


def normalise(grads: Sequence[Tensor], squares: Tensor, sizes: Sequence[int]) -> None:
    """Put each gradient, or the piece of one at hand, to a root mean square of one, in place.

    Args:
        squares: sum of squares over each whole tensor, 1-D float64.
        sizes: elements of each whole tensor.
    """
    counts = torch.tensor(sizes, dtype=squares.dtype, device=squares.device).clamp(min=1)
    for grad, factor in zip(grads, step_factors(squares / counts).unbind(), strict=True):
        grad.mul_(factor.to(grad.device, grad.dtype))
