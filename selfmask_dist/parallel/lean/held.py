"""Matrices and kernels under masks held in bf16: the frozen weight and theta, two bytes each.

    M * W is exact in bf16, theta = round(a * W * M)

Vectors (biases, gains) stay float32: they are a thousandth of the weights, and layers that normalise in
float32 take no others. The fingerprint is taken of the weights as they came, so that a mask file fits the
backbone's own file.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from selfmask_dist.common.fingerprint import digest
from selfmask_dist.common.tensor_names import plain_names
from selfmask_dist.masking import select

_CHOICE = ("exclude", "first_layers", "allow_norm")


@torch.no_grad()
def hold_in_bf16(model: nn.Module, options: Mapping[str, Any]) -> str:
    """Round the matrices of `model` that masks are put on to bf16, in place; return the fingerprint of all of
    these weights before it.

    Args:
        options: of `masking.attach`, which say what is masked.

    Raises:
        ValueError: nothing matches them.
    """
    choice = {key: options[key] for key in _CHOICE if key in options}
    names = plain_names(select(model, options.get("include", "auto"), **choice))
    parameters = dict(model.named_parameters())
    ordered = sorted((plain, parameters[name]) for name, plain in names.items())
    origin = digest(ordered)
    for _, parameter in ordered:
        if parameter.ndim > 1:
            parameter.data = parameter.data.to(torch.bfloat16)
    return origin


class InBf16:
    """Lets a module compute in bf16 whoever calls it, as a matrix in bf16 takes no inputs in float32.

    What it returns becomes float32 outside of training, for those who measure embeddings.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._device = device.type
        self._open: list[torch.autocast] = []
        module.register_forward_pre_hook(self._enter)
        module.register_forward_hook(self._leave, always_call=True)

    def _enter(self, *_: Any) -> None:
        context = torch.autocast(self._device, torch.bfloat16)
        context.__enter__()
        self._open.append(context)

    def _leave(self, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        self._open.pop().__exit__(None, None, None)
        is_outermost = not torch.is_autocast_enabled(self._device)
        return output.float() if is_outermost and isinstance(output, Tensor) else output
