"""A delta fitted to what the fine-tuned network answers, on training pictures.

    min over s, b and D of  mean (f(x; W + s sign(D), b) - f(x; tuned))^2

s: one number for each tensor, as BitDelta distils its scales (Liu et al., arXiv 2402.10193). D: starts as the
difference of the two networks; its gradient is that of s sign(D) (straight through), so that signs which cost
most turn over. b: the biases and gains that fine-tuning changed, which are stored anyway. No label is looked
at. Knows no files.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from selfmask_dist.data import BatchLoader
from selfmask_dist.maskfile import Mask


@dataclass(frozen=True)
class Calibration:
    """How a delta is fitted: by Adam, whose rates fall to zero as a cosine does.

    epochs: over the pictures.
    scale_lr: of log s. vector_lr: of b, in units of the tensor's mean change. sign_lr: of D, in units of its
    mean size. 0: not fitted.
    """

    epochs: int = 6
    scale_lr: float = 0.02
    vector_lr: float = 0.1
    sign_lr: float = 0.15


class _StraightThrough(torch.autograd.Function):
    """sign(D) forward, 0 counting as positive; backward the gradient as it is."""

    @staticmethod
    def forward(_ctx: Any, latent: Tensor) -> Tensor:
        return torch.where(latent < 0, -1.0, 1.0)

    @staticmethod
    def backward(_ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class _Fitted:
    """The tensors of a network under a delta, as functions of what is fitted: all in units of their size."""

    def __init__(
        self, mask: Mask, frozen: Mapping[str, Tensor], tuned: Mapping[str, Tensor], trainable: set[str]
    ) -> None:
        self._weights = {name: frozen[name] for name in mask.bits}
        self._sizes = {name: scales.reshape(()).float() for name, scales in mask.scales.items()}
        self._vectors = dict(mask.statistics)
        self._units = {
            name: (value - frozen[name]).abs().mean()
            for name, value in mask.statistics.items()
            if name in trainable
        }
        self.latents = {
            name: ((tuned[name] - weight) / self._sizes[name]).requires_grad_()
            for name, weight in self._weights.items()
        }
        self.log_ratios = {name: torch.zeros((), requires_grad=True) for name in self._sizes}
        self.shifts = {name: torch.zeros_like(self._vectors[name]).requires_grad_() for name in self._units}

    def scales(self) -> dict[str, Tensor]:
        return {name: size * self.log_ratios[name].exp() for name, size in self._sizes.items()}

    def vectors(self) -> dict[str, Tensor]:
        moved = {name: self._vectors[name] + self._units[name] * self.shifts[name] for name in self.shifts}
        return self._vectors | moved

    def tensors(self) -> dict[str, Tensor]:
        scales = self.scales()
        thetas = {
            name: weight + scales[name] * _StraightThrough.apply(self.latents[name])
            for name, weight in self._weights.items()
        }
        return thetas | self.vectors()

    def optimizer(self, settings: Calibration) -> torch.optim.Adam:
        parts = (
            (self.log_ratios, settings.scale_lr),
            (self.shifts, settings.vector_lr),
            (self.latents, settings.sign_lr),
        )
        for tensors, rate in parts:
            for tensor in tensors.values():
                tensor.requires_grad_(rate > 0)
        groups = [{"params": list(tensors.values()), "lr": rate} for tensors, rate in parts if rate > 0]
        return torch.optim.Adam([group for group in groups if group["params"]])

    def put_in(self, mask: Mask) -> Mask:
        return replace(
            mask,
            scales={name: scale.detach().double().reshape(1, 1) for name, scale in self.scales().items()},
            signs={name: (latent.detach() < 0) for name, latent in self.latents.items()},
            statistics={name: vector.detach().clone() for name, vector in self.vectors().items()},
        )


def calibrate(
    mask: Mask,
    encoder: nn.Module,
    *,
    frozen: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    batches: BatchLoader,
    answer: Callable[[Tensor], Tensor],
    settings: Calibration,
) -> tuple[Mask, list[float]]:
    """Return the fitted delta, and the mean squared error of each epoch.

    Args:
        mask: of kind `delta`, with one size for each tensor.
        encoder: images -> features; its own tensors are not touched.
        frozen, tuned: its tensors by name, before and after fine-tuning.
        batches: of training pictures. answer: what is compared: features -> logits, or the features.

    Raises:
        ValueError: the error is not finite, so that nothing can be fitted.
    """
    fitted = _Fitted(mask, frozen, tuned, {name for name, _ in encoder.named_parameters()})
    optimizer = fitted.optimizer(settings)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs * len(batches))
    errors = []
    for epoch in range(settings.epochs):
        batches.set_epoch(epoch)
        total = 0.0
        for batch in batches:
            images = batch.views[0]
            with torch.no_grad():
                target = answer(functional_call(encoder, dict(tuned), (images,)).float())
            found = answer(functional_call(encoder, fitted.tensors(), (images,)).float())
            loss = ((found - target).square().mean(dim=1) * batch.weights).sum() / batch.weights.sum()
            if not loss.isfinite():
                raise ValueError(f"the error of the delta is {loss.item()}: it cannot be calibrated")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        errors.append(total / len(batches))
    return fitted.put_in(mask), errors
