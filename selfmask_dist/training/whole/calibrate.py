"""The sizes of a delta's signs fitted to what the fine-tuned network answers, on training pictures.

    min over s and b of  mean (f(x; W + s sign(Delta), b) - f(x; tuned))^2

s: one number for each tensor, as BitDelta distils its scales (Liu et al., arXiv 2402.10193). b: the biases
and gains that fine-tuning changed; they are stored anyway, and are fitted too where `vectors` asks for it.
No label is looked at. Knows no files.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from selfmask_dist.data import BatchLoader
from selfmask_dist.maskfile import Mask


@dataclass(frozen=True)
class Calibration:
    """How sizes are fitted: by Adam, whose rate falls to zero as a cosine does.

    epochs: over the pictures.
    scale_lr: of log s. vector_lr: of b, in units of the tensor's mean change.
    vectors: whether b is fitted too.
    """

    epochs: int = 2
    scale_lr: float = 0.02
    vector_lr: float = 0.1
    vectors: bool = True


class _Fitted:
    """The tensors of a network under a delta, as functions of what is fitted."""

    def __init__(
        self, mask: Mask, frozen: Mapping[str, Tensor], trainable: set[str], settings: Calibration
    ) -> None:
        self._weights = {name: frozen[name] for name in mask.bits}
        self._signs = {name: 1 - 2 * mask.signs[name].to(frozen[name].dtype) for name in mask.bits}
        self._scales = {name: scales.reshape(()).float() for name, scales in mask.scales.items()}
        self._vectors = dict(mask.statistics)
        self._units = {
            name: (value - frozen[name]).abs().mean()
            for name, value in mask.statistics.items()
            if settings.vectors and name in trainable
        }
        self.log_ratios = {name: torch.zeros((), requires_grad=True) for name in self._scales}
        self.shifts = {name: torch.zeros_like(self._vectors[name]) for name in self._units}
        for shift in self.shifts.values():
            shift.requires_grad_()

    def scales(self) -> dict[str, Tensor]:
        return {name: scale * self.log_ratios[name].exp() for name, scale in self._scales.items()}

    def vectors(self) -> dict[str, Tensor]:
        moved = {name: self._vectors[name] + self._units[name] * self.shifts[name] for name in self.shifts}
        return self._vectors | moved

    def tensors(self) -> dict[str, Tensor]:
        scales = self.scales()
        thetas = {name: self._weights[name] + scales[name] * sign for name, sign in self._signs.items()}
        return thetas | self.vectors()


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
    """Return the delta with fitted sizes, and the mean squared error of each epoch.

    Args:
        mask: of kind `delta`, with one size for each tensor.
        encoder: images -> features; its own tensors are not touched.
        frozen, tuned: its tensors by name, before and after fine-tuning.
        batches: of training pictures. answer: what is compared: features -> logits, or the features.

    Raises:
        ValueError: the error is not finite, so that nothing can be fitted.
    """
    trainable = {name for name, _ in encoder.named_parameters()}
    fitted = _Fitted(mask, frozen, trainable, settings)
    groups = [
        {"params": list(fitted.log_ratios.values()), "lr": settings.scale_lr},
        {"params": list(fitted.shifts.values()), "lr": settings.vector_lr},
    ]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]])
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
    scales = {name: scale.detach().double().reshape(1, 1) for name, scale in fitted.scales().items()}
    vectors = {name: vector.detach().clone() for name, vector in fitted.vectors().items()}
    return replace(mask, scales=scales, statistics=vectors), errors
