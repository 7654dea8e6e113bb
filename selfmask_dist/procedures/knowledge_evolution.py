"""Knowledge Evolution: a network's fit half is kept from generation to generation, the rest starts anew.

    w := train(w)        w := m * w + (1 - m) * random        ... for each generation

KELS, the split by kernels, keeps the first ceil(s * outputs) x ceil(s * inputs) of each layer, so that the
fit half is a slim network of its own, see `slim`. WELS keeps a random share s of the weights, of any
architecture. (Taha, Shrivastava, Davis, "Knowledge Evolution in Neural Networks", CVPR 2021, arXiv
2103.05152, section 3.) Pure functions on tensors by name; knows no training loop.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from selfmask_dist.backbones.weights import write
from selfmask_dist.masking.selection import is_norm

Split = dict[str, Tensor]
"""{parameter name: bool tensor of its shape}, True where a weight is part of the fit hypothesis."""


def kels(model: nn.Module, rate: float, *, outputs: Sequence[str] = ()) -> Split:
    """The split by kernels: first outputs and inputs of every layer; of a first layer all inputs.

    Args:
        rate: s, the share of channels that is kept, above 0 and at most 1.
        outputs: names of layers whose outputs are the network's: all of them are kept.

    Raises:
        ValueError: a rate outside these bounds, or a layer that is neither a plain convolution, linear nor
            batch normalisation.
    """
    check_rate(rate)
    split: Split = {}
    is_first = True
    for name, module in layers(model):
        mask = {key: torch.ones_like(p, dtype=torch.bool) for key, p in module.named_parameters()}
        if name not in outputs:
            for value in mask.values():
                value[kept(len(value), rate) :] = False
        if not is_norm(module):
            if not is_first:
                mask["weight"][:, kept(mask["weight"].shape[1], rate) :] = False
            is_first = False
        split |= {f"{name}.{key}": value for key, value in mask.items()}
    return split


def wels(weights: Mapping[str, Tensor], rate: float, *, seed: int) -> Split:
    """The split by weights: a random share of each tensor, `round(rate * size)` entries of it."""
    check_rate(rate)
    generator, split = torch.Generator().manual_seed(seed), {}
    for name, weight in weights.items():
        order = torch.rand(weight.numel(), generator=generator).argsort(stable=True)
        mask = torch.zeros(weight.numel(), dtype=torch.bool)
        mask[order[: round(rate * weight.numel())]] = True
        split[name] = mask.view(weight.shape)
    return split


def evolve(weights: Mapping[str, Tensor], fresh: Mapping[str, Tensor], split: Split) -> dict[str, Tensor]:
    """The next generation's first weights: m * w + (1 - m) * fresh; names without a split stay.

    Args:
        fresh: new random weights of the same architecture. The authors draw the rest uniformly (Kaiming).
    """
    if missing := sorted(set(split) - set(weights)):
        raise ValueError(f"the split has {missing[0]}, which the weights lack")
    return {
        name: torch.where(split[name], tensor, fresh[name]) if name in split else tensor.clone()
        for name, tensor in weights.items()
    }


def fit(weights: Mapping[str, Tensor], split: Split) -> dict[str, Tensor]:
    """The fit hypothesis alone: m * w; names without a split as they are."""
    return {
        name: torch.where(split[name], tensor, 0) if name in split else tensor.clone()
        for name, tensor in weights.items()
    }


def generations(
    model: nn.Module,
    split: Split,
    train_fn: Callable[[int], None],
    fresh_fn: Callable[[int], Mapping[str, Tensor]],
    *,
    count: int,
) -> None:
    """Train `count` generations in place; the last one is not reset.

    Args:
        train_fn: (generation) trains the whole model.
        fresh_fn: (generation) -> random weights by name for the reset half.
    """
    for generation in range(count):
        if generation:
            write(model, evolve(model.state_dict(), fresh_fn(generation), split))
        train_fn(generation)


def kept(size: int, rate: float) -> int:
    """Channels that a split keeps of `size`: ceil(rate * size)."""
    return math.ceil(size * rate)


def check_rate(rate: float) -> None:
    if not 0 < rate <= 1:
        raise ValueError(f"a split rate lies above 0 and at most at 1, got {rate}")


def layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules with parameters of their own, in the model's order."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    ]
    for name, module in found:
        is_plain = isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
        if not is_plain and not isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            raise ValueError(
                f"KELS splits plain convolutions, linear layers and batch normalisation; {name} is a "
                f"{type(module).__name__}. Take the split by weights (WELS) for this network"
            )
    return found
