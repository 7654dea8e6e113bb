"""A smaller dense network out of one whose heads and hidden units are partly zero: what does nothing goes.

    removed = shrink(model)                          # in place; outputs are the same to rounding
    save_smaller(model, removed, "folder")           # model.safetensors and sizes.json
    load_smaller(timm.create_model(...), "folder")   # the same class of model, cut to size

A hidden unit goes where no weight reads it, or where none feeds it: it is then constant, and what it adds
moves into the next bias. A head goes where no weight reads it, or where no weight feeds its values, whose
bias it then passes on whatever it attends to. Knows timm's attention and MLP, and linear layers with
elementwise activations between them in a Sequential; nothing of masks.
"""

import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from selfmask_dist.common.files import replacing, write_json

# what acts on each number by itself, so that a constant stays one
_ELEMENTWISE = (
    nn.ReLU,
    nn.GELU,
    nn.SiLU,
    nn.Tanh,
    nn.Sigmoid,
    nn.LeakyReLU,
    nn.ELU,
    nn.Hardswish,
    nn.Identity,
)
_WEIGHTS, _SIZES = "model.safetensors", "sizes.json"


@torch.no_grad()
def shrink(model: nn.Module) -> dict[str, int]:
    """Remove heads and hidden units that do nothing, in place; one of each layer always stays.

    Returns:
        what every layer that can be cut has left: heads of an attention, hidden units of an MLP or of a
        linear layer before another, by the module's name.
    """
    left: dict[str, int] = {}
    for name, attention in _attentions(model):
        left[name] = _shrink_attention(attention)
    for name, first, between, last in _pairs(model):
        left[name] = _shrink_pair(first, between, last)
    return left


def resize(model: nn.Module, left: Mapping[str, int]) -> None:
    """Cut a whole model's layers to the sizes that `shrink` found; their weights are then to be loaded.

    Raises:
        ValueError: the model has no such layers, or smaller ones.
    """
    attentions = dict(_attentions(model))
    pairs = {name: (first, last) for name, first, _, last in _pairs(model)}
    if left.keys() != attentions.keys() | pairs.keys():
        wrong = sorted(left.keys() ^ (attentions.keys() | pairs.keys()))
        raise ValueError(
            f"the sizes are of another model: {wrong[:5]} are not in both; build the model shrunk"
        )
    for name, number in left.items():
        most = attentions[name].num_heads if name in attentions else pairs[name][0].out_features
        if not 1 <= number <= most:
            raise ValueError(
                f"{name} has {most}, and the sizes say {number}; build the model that was shrunk"
            )
        stay = torch.arange(number)
        if name in attentions:
            _cut_attention(attentions[name], stay)
        else:
            _cut_rows(pairs[name][0], stay)
            _cut_columns(pairs[name][1], stay)


def save_smaller(model: nn.Module, left: Mapping[str, int], folder: str | Path) -> list[Path]:
    """Write a shrunk model's weights and sizes into a folder; returns the files."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / _WEIGHTS) as partial:
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, partial)
    write_json(folder / _SIZES, dict(left))
    return [folder / _WEIGHTS, folder / _SIZES]


def load_smaller(model: nn.Module, folder: str | Path) -> None:
    """Cut `model`, built as the one that was shrunk, to size and load its weights, in place.

    Raises:
        ValueError: the folder is of another model.
    """
    left = json.loads((Path(folder) / _SIZES).read_text())
    if not isinstance(left, dict) or not all(type(number) is int for number in left.values()):
        raise ValueError(f"{Path(folder) / _SIZES} does not hold a size for each layer; write it again")
    resize(model, left)
    model.load_state_dict(load_file(Path(folder) / _WEIGHTS))


# ---- attention


def _attentions(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield timm's attentions whose heads do not meet before the projection."""
    for name, module in model.named_modules():
        parts = ("qkv", "proj", "num_heads", "head_dim", "attn_dim")
        if all(hasattr(module, part) for part in parts) and _is_plain_attention(module):
            yield name, module


def _is_plain_attention(module: Any) -> bool:
    is_linear = isinstance(module.qkv, nn.Linear) and isinstance(module.proj, nn.Linear)
    has_norm = not isinstance(getattr(module, "norm", nn.Identity()), nn.Identity)
    return is_linear and not has_norm and getattr(module, "gate", None) is None


def _shrink_attention(attention: Any) -> int:
    heads, size = attention.num_heads, attention.head_dim
    read = attention.proj.weight.unflatten(1, (heads, size)).any(dim=2).any(dim=0)
    values = attention.qkv.weight.chunk(3)[2].unflatten(0, (heads, size))
    is_fed = values.flatten(1).any(dim=1)
    bias = _bias(attention.qkv).chunk(3)[2].unflatten(0, (heads, size))
    can_move = is_fed | (attention.proj.bias is not None) | ~bias.any(dim=1)
    stay = _at_least_one(read & (is_fed | ~can_move))
    constant = torch.zeros_like(bias)
    constant[~stay & ~is_fed] = bias[~stay & ~is_fed]
    _add_to_bias(attention.proj, constant.flatten())
    _cut_attention(attention, stay.nonzero().flatten())
    return int(stay.sum())


def _cut_attention(attention: Any, stay: Tensor) -> None:
    """Keep the heads `stay`, given by number."""
    heads, size = attention.num_heads, attention.head_dim
    rows = (stay[:, None] * size + torch.arange(size)).flatten()
    _cut_rows(attention.qkv, torch.cat([rows + part * heads * size for part in range(3)]))
    _cut_columns(attention.proj, rows)
    attention.num_heads = len(stay)
    attention.attn_dim = len(stay) * size


# ---- two linear layers


def _pairs(model: nn.Module) -> Iterator[tuple[str, nn.Linear, nn.Module, nn.Linear]]:
    """Yield (name, linear layer, what is between, linear layer) of timm's MLPs and of Sequentials."""
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, nn.Sequential):
            parts = list(module.named_children())
            linear = [i for i, (_, part) in enumerate(parts) if isinstance(part, nn.Linear)]
            for i, j in itertools.pairwise(linear):
                between = [part for _, part in parts[i + 1 : j]]
                if all(isinstance(part, (*_ELEMENTWISE, nn.Dropout)) for part in between):
                    first, last = parts[i][1], parts[j][1]
                    assert isinstance(first, nn.Linear)
                    assert isinstance(last, nn.Linear)
                    active = [part for part in between if not isinstance(part, nn.Dropout)]
                    yield prefix + parts[i][0], first, nn.Sequential(*active), last
        elif all(hasattr(module, part) for part in ("fc1", "act", "fc2")):
            first, last, act = module.fc1, module.fc2, module.act
            is_plain = isinstance(getattr(module, "norm", nn.Identity()), nn.Identity)
            is_linear = isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
            if is_linear and is_plain and isinstance(act, _ELEMENTWISE):
                yield f"{prefix}fc1", first, act, last


def _shrink_pair(first: nn.Linear, between: nn.Module, last: nn.Linear) -> int:
    read, is_fed = last.weight.any(dim=0), first.weight.any(dim=1)
    constant = between(_bias(first).clone())  # an activation may work in place
    can_move = is_fed | (last.bias is not None) | (constant == 0)
    stay = _at_least_one(read & (is_fed | ~can_move))
    _add_to_bias(last, constant.where(~stay & ~is_fed, 0))
    places = stay.nonzero().flatten()
    _cut_rows(first, places)
    _cut_columns(last, places)
    return len(places)


def _at_least_one(stay: Tensor) -> Tensor:
    if not stay.any():
        stay[0] = True
    return stay


def _bias(layer: nn.Linear) -> Tensor:
    return layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias.detach()


def _add_to_bias(layer: nn.Linear, inputs: Tensor) -> None:
    """Add what constant inputs contribute to the layer's output."""
    if layer.bias is not None and inputs.any():
        layer.bias.add_(layer.weight @ inputs)


def _cut_rows(layer: nn.Linear, stay: Tensor) -> None:
    layer.weight = nn.Parameter(layer.weight[stay].clone(), layer.weight.requires_grad)
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias[stay].clone(), layer.bias.requires_grad)
    layer.out_features = len(stay)


def _cut_columns(layer: nn.Linear, stay: Tensor) -> None:
    layer.weight = nn.Parameter(layer.weight[:, stay].clone(), layer.weight.requires_grad)
    layer.in_features = len(stay)
