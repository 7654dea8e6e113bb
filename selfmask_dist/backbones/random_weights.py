"""Frozen random weights for masks to choose from (Ramanujan et al. 2020, arXiv 1911.13299, section 4).

    s = (2 / fan_in)^(1/2)    signed_constant: +s or -s with equal chances    kaiming_normal: N(0, s^2)

fan_in is the number of inputs that one output sums over. The published "scaled" variants multiply s by
1 / k^(1/2) for the share k that is kept, which is the scale a of a mask.
"""

import math

import torch
from torch import Tensor, nn

from selfmask_dist.common.seeding import named_generator

KINDS = ("signed_constant", "kaiming_normal")
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@torch.no_grad()
def randomise(encoder: nn.Module, kind: str, *, seed: int) -> None:
    """Draw the weights of all convolutions, linear layers and attention projections anew, in place.

    Each parameter has a generator of its own, of (seed, name). Normalisation layers get factor 1 and shift 0
    (the published ones have neither; timm starts some at 0, which frozen would cut residual branches off).
    Biases and embeddings stay as they are.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"random weights {kind!r} are not one of {', '.join(KINDS)}")
    for module_name, module in encoder.named_modules():
        is_norm = "norm" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(recurse=False):
            if is_norm:
                parameter.fill_(1.0 if name == "weight" else 0.0)
            is_layer = isinstance(module, _LAYERS) and name == "weight"
            is_projection = isinstance(module, nn.MultiheadAttention) and parameter.ndim == 2
            if is_layer or is_projection:
                parameter.copy_(_draw(parameter, kind, f"{module_name}.{name}", seed))


def _draw(parameter: Tensor, kind: str, name: str, seed: int) -> Tensor:
    generator = named_generator(seed, f"random weights/{name}")
    deviation = math.sqrt(2 / parameter[0].numel())
    if kind == "kaiming_normal":
        return torch.randn(parameter.shape, generator=generator) * deviation
    signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
    return signs * deviation
