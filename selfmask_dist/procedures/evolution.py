"""Knowledge Evolution: a network's fit half is kept from generation to generation, the rest starts anew.

    w := train(w)        w := m * w + (1 - m) * random        ... for each generation
    slim(x) = dense(m * w)(x), to rounding

KELS, the split by kernels, keeps the first ceil(s * outputs) x ceil(s * inputs) of each layer, so that the
fit half is a slim dense network of its own. WELS keeps a random share s of the weights, of any architecture.
(Taha, Shrivastava, Davis, "Knowledge Evolution in Neural Networks", CVPR 2021, arXiv 2103.05152, section 3.)

The equations come first, as pure functions on tensors by name; then the slim network and what it costs;
then the run. Operations are counted as the authors do: a convolution's and a linear layer's multiplications
and additions apart, two for each entry that normalisation sees, one for each rectified one, and the
comparisons of the pooling. The parameters in their tables include the split's mask, which has as many
entries as the convolutions and the classifier have weights (`Cost.masked`).
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from selfmask_dist.backbones.weights import write
from selfmask_dist.common.names import ENCODER
from selfmask_dist.config import Config
from selfmask_dist.evals.measure import Evaluation
from selfmask_dist.masking.selection import is_norm
from selfmask_dist.procedures.packnet import packable
from selfmask_dist.runs.context import RunContext
from selfmask_dist.training.build import build_backbone, open_data
from selfmask_dist.training.chain import Chain, Tensors, other_seed

Split = dict[str, Tensor]
"""{parameter name: bool tensor of its shape}, True where a weight is part of the fit hypothesis."""


def kels(model: nn.Module, rate: float, *, outputs: Sequence[str] = ()) -> Split:
    """Return the split by kernels: the first outputs and inputs of every layer, and all inputs of the first.

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
    """Return the split by weights: a random share of each tensor, `round(rate * size)` entries of it."""
    check_rate(rate)
    generator, split = torch.Generator().manual_seed(seed), {}
    for name, weight in weights.items():
        order = torch.rand(weight.numel(), generator=generator).argsort(stable=True)
        mask = torch.zeros(weight.numel(), dtype=torch.bool)
        mask[order[: round(rate * weight.numel())]] = True
        split[name] = mask.view(weight.shape)
    return split


def evolve(weights: Mapping[str, Tensor], fresh: Mapping[str, Tensor], split: Split) -> dict[str, Tensor]:
    """Return the next generation's first weights: m * w + (1 - m) * fresh. Names without a split stay.

    Args:
        fresh: new random weights of the same architecture. The authors draw the rest uniformly (Kaiming).
    """
    if missing := sorted(set(split) - set(weights)):
        raise ValueError(f"the split has {missing[0]}, which the weights lack")
    return {
        name: torch.where(split[name], tensor, fresh[name]) if name in split else tensor.clone()
        for name, tensor in weights.items()
    }


def fit_hypothesis(weights: Mapping[str, Tensor], split: Split) -> dict[str, Tensor]:
    """Return the fit hypothesis alone: m * w; names without a split as they are."""
    return {
        name: torch.where(split[name], tensor, 0) if name in split else tensor.clone()
        for name, tensor in weights.items()
    }


def kept(size: int, rate: float) -> int:
    """Return how many of `size` channels a split keeps: ceil(rate * size)."""
    return math.ceil(size * rate)


def check_rate(rate: float) -> None:
    """Raise a ValueError unless the rate lies above 0 and at most at 1."""
    if not 0 < rate <= 1:
        raise ValueError(f"a split rate lies above 0 and at most at 1, got {rate}")


def layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the modules with parameters of their own, in the model's order.

    Raises:
        ValueError: one of them is neither a plain convolution, linear nor batch normalisation.
    """
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


# ---- the slim network inside a KELS split


@dataclass(frozen=True)
class Cost:
    """What a network costs.

    operations: for one image. parameters: all of them. masked: those that a split's mask covers.
    """

    operations: int
    parameters: int
    masked: int


@torch.no_grad()
def extract_slim(model: nn.Module, rate: float, *, outputs: Sequence[str] = ()) -> nn.Module:
    """Return a copy of `model` with only the channels that `kels(model, rate, outputs=outputs)` keeps.

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
            _set_sizes(module)
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
def measure_cost(model: nn.Module, image_size: int) -> Cost:
    """Return what a forward on one square image of 3 channels costs."""
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


def _set_sizes(module: nn.Conv2d | nn.Linear) -> None:
    out, inputs = module.weight.shape[:2]
    if isinstance(module, nn.Conv2d):
        module.out_channels, module.in_channels = out, inputs
    else:
        module.out_features, module.in_features = out, inputs


# ---- the run


def run_evolution(chain: Chain) -> dict[str, Any]:
    """Train every generation; `fit.safetensors` holds the last one's fit half (kels: a slim network)."""
    section, config = chain.config.procedure, chain.config
    encoder = build_backbone(config).encoder
    if section.split == "kels":
        split = kels(encoder, section.split_rate)
    else:
        names = packable(encoder, section.include)
        weights = {name: encoder.get_parameter(name) for name in names}
        split = wels(weights, section.split_rate, seed=config.seed)
    weights_path, generations = config.backbone.weights, []
    last: Tensors = {}
    for index in range(section.generations):
        if index:
            path = chain.once(
                f"generation-{index}-start.safetensors",
                evolve,
                last,
                _fresh(config, index),
                split,
            )
            weights_path = str(path)
        result = chain.train(f"generation-{index}", backbone={"weights": weights_path})
        last = load_file(chain.folder / f"generation-{index}" / ENCODER)
        generations.append(result["adapted"])
    write(encoder, last)
    network = encoder
    if section.split == "kels":
        network = extract_slim(encoder, section.split_rate)
    else:
        write(network, fit_hypothesis(last, split))
    chain.once("fit.safetensors", network.state_dict)
    size = build_backbone(config).spec.preprocessing.image_size
    values = chain.measure("fit.json", lambda context: _measure_fit(config, context, network))
    costs = {
        name: {"parameters": found.parameters, "operations": found.operations}
        for name, found in (("dense", measure_cost(encoder, size)), ("fit", measure_cost(network, size)))
        if section.split == "kels"
    }
    return {
        "generations": generations,
        "adapted": generations[-1],
        "fit": values,
        "costs": costs,
        "stored_bytes": sum(4 * p.numel() for p in encoder.parameters()),
    }


def _fresh(config: Config, generation: int) -> Tensors:
    """Return random weights of the same architecture, others for each generation."""
    values = config.model_dump(mode="json")
    values["backbone"] = {**values["backbone"], "pretrained": False, "weights": None}
    values["seed"] = other_seed(config.seed, generation)
    return dict(build_backbone(type(config).model_validate(values)).encoder.state_dict())


def _measure_fit(config: Config, context: RunContext, network: nn.Module) -> dict[str, float]:
    backbone = build_backbone(config)
    backbone.encoder = network.to(context.world.device).eval()
    with torch.no_grad():
        size = backbone.spec.preprocessing.image_size
        dim = backbone.encoder(torch.zeros(1, 3, size, size, device=context.world.device)).shape[1]
    backbone.spec = replace(backbone.spec, dim=dim)
    train, test = open_data(config)
    paced = context.paced_check
    evaluation = Evaluation(config, backbone, train, test, context.world, begin_loop=paced)
    return evaluation.full(probe=config.eval.probe)
