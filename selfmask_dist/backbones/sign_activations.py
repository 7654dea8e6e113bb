"""Activations of one bit: sign(x) in place of a network's rectifiers, as in binary networks.

    forward   +1 where x >= 0, else -1
    backward  straight through where |x| <= 1, else 0

Hubara et al. 2016, arXiv 1602.02830, eq. 4; multi-prize tickets call it 1/1 (Diffenderfer and Kailkhura 2021,
arXiv 2103.09377). No weight changes, so fingerprints stay.
"""

from typing import Any

import torch
from torch import Tensor, nn

RECTIFIERS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Hardswish)


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.abs() <= 1)
        return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (passes,) = ctx.saved_tensors
        return grad * passes


class SignActivation(nn.Module):
    """See the module's docstring; keeps shape and dtype."""

    def forward(self, x: Tensor) -> Tensor:
        sign: Tensor = _Sign.apply(x)
        return sign


def use_sign_activations(encoder: nn.Module) -> int:
    """Replace every rectifier module of `encoder` in place; returns how many there were.

    Raises:
        ValueError: it has none as a module of its own.
    """
    found = [name for name, module in encoder.named_modules() if isinstance(module, RECTIFIERS)]
    for name in found:
        encoder.set_submodule(name, SignActivation())
    if not found:
        raise ValueError(
            "backbone.activations=sign: the network has none of "
            f"{', '.join(kind.__name__ for kind in RECTIFIERS)} as a module; set backbone.activations=library"
        )
    return len(found)
