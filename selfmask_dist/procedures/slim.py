"""The slim network inside a KELS split: a dense network of the kept channels, and what it costs.

    slim(x) = dense(x) with everything outside the split at zero, to rounding

Operations are counted as the authors of Knowledge Evolution do: a convolution's and a linear layer's
multiplications and additions apart, two for each entry that normalisation sees, one for each rectified one,
comparisons of the pooling. Their parameters include the split's mask, as many entries as the convolutions
and the classifier have weights. See `knowledge_evolution`.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from selfmask_dist.procedures.knowledge_evolution import check_rate, kept, layers


@dataclass(frozen=True)
class Cost:
    """operations: for one image. parameters: all. masked: those that a split's mask covers."""

    operations: int
    parameters: int
    masked: int

    @property
    def as_published(self) -> int:
        """Parameters with the mask's entries, as the paper's tables have them."""
        return self.parameters + self.masked


@torch.no_grad()
def extract(model: nn.Module, rate: float, *, outputs: Sequence[str] = ()) -> nn.Module:
    """A copy of `model` with only the channels that `kels(model, rate, outputs=outputs)` keeps.

    Its forward must not state channel counts of its own: ResNets, plain convolutional networks and MLPs.

    Raises:
        ValueError: as `kels`.
    """
    check_rate(rate)
    slim, is_first = copy.deepcopy(model), True
    for name, module in layers(slim):
        out = slice(None) if name in outputs else slice(kept(len(module.get_parameter("weight")), rate))
        if isinstance(module, nn.Conv2d | nn.Linear):
            inputs = slice(None) if is_first else slice(kept(module.weight.shape[1], rate))
            module.weight = _cut(module.weight[out, inputs])
            _tell_size(module)
            is_first = False
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.weight = _cut(module.get_parameter("weight")[out])
            for key, buffer in module.named_buffers():
                if buffer.ndim:
                    setattr(module, key, buffer[out].clone())
            module.num_features = len(module.weight)
        if module.bias is not None:
            module.bias = _cut(module.get_parameter("bias")[out])
    return slim


@torch.no_grad()
def cost(model: nn.Module, image_size: int) -> Cost:
    """What a forward on one square image of 3 channels costs."""
    total = 0

    def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
        nonlocal total
        total += _operations(module, inputs[0], output)

    handles = [m.register_forward_hook(count) for m in model.modules() if not list(m.children())]
    was_training = model.training
    model.eval()
    try:
        model(torch.zeros(1, 3, image_size, image_size, device=next(model.parameters()).device))
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    weights = [m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    return Cost(total, sum(p.numel() for p in model.parameters()), sum(weights))


def _operations(module: nn.Module, before: Tensor, after: Tensor) -> int:
    if isinstance(module, nn.Conv2d | nn.Linear):
        products = module.weight[0].numel()
        # a convolution's bias is counted, a linear layer's is not
        bias = int(isinstance(module, nn.Conv2d) and module.bias is not None)
        return after.numel() * (2 * products - 1 + bias)
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        return 2 * before.numel()
    if isinstance(module, nn.ReLU):
        return before.numel()
    if isinstance(module, nn.MaxPool2d):
        size = module.kernel_size
        # a side alone is taken for the whole kernel, as theirs
        return after.numel() * ((size if isinstance(size, int) else math.prod(size)) - 1)
    return 0


def _cut(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.clone())


def _tell_size(module: nn.Conv2d | nn.Linear) -> None:
    out, inputs = module.weight.shape[:2]
    if isinstance(module, nn.Conv2d):
        module.out_channels, module.in_channels = out, inputs
    else:
        module.out_features, module.in_features = out, inputs
