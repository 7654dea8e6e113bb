"""SGD with momentum that can keep the momentum of scores, and scores themselves, in bf16.

    v <- m v + g        S <- S - lr v        reckoned in float32, bit for bit as torch.optim.SGD does

Momentum is rounded to the nearest number. Scores are rounded at random, up with the probability that makes
the mean exact: a step of a thousandth of a score, which the nearest bf16 would swallow for ever, then moves
one score of some and none of others. The noise is a hash of (seed, tensor, step, element), so every rank, and
a run that goes on from a checkpoint, draws the same.
"""

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_WORD = 0xFFFFFFFF
_CHUNK = 1 << 18  # elements whose noise is made at once, on a CPU: the hash takes 8 bytes for each
_GPU_CHUNK = 1 << 24


class LeanSGD(torch.optim.SGD):
    """See the module. Groups whose `"in_bf16"` is set keep momentum in bf16.

    `names` and `clock` are set by the engine: the name of each tensor by its id, and the steps done.
    """

    def __init__(self, groups: list[dict[str, Any]], *, momentum: float, seed: int) -> None:
        super().__init__(groups, lr=groups[0]["lr"], momentum=momentum)
        self.seed = seed
        chosen = [group for group in self.param_groups if group.get("in_bf16")]
        self._in_bf16 = {id(parameter) for group in chosen for parameter in group["params"]}
        self.names: Mapping[int, str] = {}
        self.clock: Callable[[], int] = lambda: 0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # there are no closures here
        """Step every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.step_tensor(group, parameter, parameter.grad)

    @torch.no_grad()
    def step_tensor(self, group: Mapping[str, Any], parameter: nn.Parameter, grad: Tensor) -> None:
        """Step one parameter of a group by its gradient, float32 where the parameter is bf16."""
        if group["weight_decay"]:
            grad = grad.add(parameter, alpha=group["weight_decay"])
        moved = self._momentum(group, parameter, grad) if group["momentum"] else grad
        if parameter.dtype != torch.bfloat16:
            parameter.add_(moved, alpha=-group["lr"])
            return
        name = self.names[id(parameter)]
        key = zlib.crc32(f"{self.seed}/{self.clock()}/{name}".encode())
        target, steps = parameter.view(-1), moved.reshape(-1)
        chunk = _CHUNK if parameter.device.type == "cpu" else _GPU_CHUNK
        for first in range(0, target.numel(), chunk):
            piece = target[first : first + chunk]
            values = piece.float().add_(steps[first : first + chunk], alpha=-group["lr"])
            piece.copy_(round_at_random(values, key, first))

    def _momentum(self, group: Mapping[str, Any], parameter: nn.Parameter, grad: Tensor) -> Tensor:
        """Return the new momentum in the gradient's dtype, and keep it as it is to be kept."""
        state = self.state[parameter]
        kept = state.get("momentum_buffer")
        dtype = self.moment_dtype(parameter)
        if kept is None:
            state["momentum_buffer"] = grad.detach().to(dtype, copy=True)
            return grad
        if kept.dtype == grad.dtype:
            return kept.mul_(group["momentum"]).add_(grad)
        moved = kept.to(grad.dtype).mul_(group["momentum"]).add_(grad)
        kept.copy_(moved)
        return moved

    def moment_dtype(self, parameter: nn.Parameter) -> torch.dtype:
        """Return what the momentum of a parameter is held in."""
        if id(parameter) in self._in_bf16:
            return torch.bfloat16
        return torch.float32 if parameter.dtype == torch.bfloat16 else parameter.dtype


def round_at_random(values: Tensor, key: int, first: int) -> Tensor:
    """Return float32 numbers rounded to bf16, up or down at random so that their mean is exact.

    Args:
        values: 1-D, overwritten.
        key: of the noise. first: the number of the first element in its whole tensor.
    """
    bits = values.view(torch.int32)
    noise = _hash(torch.arange(first, first + len(values), device=values.device), key) & 0xFFFF
    is_finite = values.isfinite()  # adding to the bits of infinity would make it no number
    rounded = bits.add(noise.to(torch.int32)).bitwise_and_(-0x10000)
    return torch.where(is_finite, rounded.view(torch.float32), values).to(torch.bfloat16)


def _hash(numbers: Tensor, key: int) -> Tensor:
    """Return 32 mixed bits of each number (int64) and the key: murmur3's last step, twice over."""
    found = numbers.mul(0x9E3779B1).add_(key).bitwise_and_(_WORD)
    for factor in (0x85EBCA6B, 0xC2B2AE35):
        found = found.bitwise_xor_(found >> 16).mul_(factor).bitwise_and_(_WORD)
    return found.bitwise_xor_(found >> 15)
