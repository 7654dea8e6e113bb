"""Which parameters of a model are weights of its layers, and which of these lie inside its repeated blocks.

Everything is read from the module tree: types, children and the order of registration, never from names of
parameters. A layer is linear, a convolution, or an attention module that holds its projections as bare
parameters. A block is a module of two layers or more whose type is repeated in a stack (a Sequential,
ModuleList or ModuleDict, or a module whose children all have one type). The body reaches from the first
block to the last, with what lies between stages; before it is the stem, after it are pooling and heads.

Knows no architecture, and nothing of scores, files or process groups.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.utils import parametrize

from selfmask_dist.common.tensor_names import plain

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_LAYERS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd)
_FEW_CHANNELS = 4  # those of an image; inside a network there are more
_HEADS = ("head", "heads", "head_dist", "fc", "classifier", "classif", "last_linear", "logits")


@dataclass(frozen=True)
class LayerParameters:
    """The parameters of one layer.

    name: of the module that owns them; for a parametrised weight, of the layer that it is made for.
    matrices: full names of its weights, which have two dimensions or more.
    biases: full names of its biases.
    """

    name: str
    module: nn.Module
    matrices: tuple[str, ...]
    biases: tuple[str, ...]


@dataclass(frozen=True)
class LayerParts:
    """The layers of a model by where they lie, each in the model's own order.

    stem: before the first block, and whatever else reads the image. body: from the first block to the last.
    pool: after the last block, without the classifier: attention pooling, final convolutions, projections.
    head: classifiers.
    """

    stem: tuple[LayerParameters, ...]
    body: tuple[LayerParameters, ...]
    pool: tuple[LayerParameters, ...]
    head: tuple[LayerParameters, ...]


def is_norm(module: nn.Module) -> bool:
    """Return whether `module` normalises: batch, layer, group, RMS, ... and timm's norm-activation layers.

    By the name of its type, or by the running statistics that it owns.
    """
    return "norm" in type(module).__name__.lower() or "running_mean" in module._buffers


def each_layer(model: nn.Module) -> Iterator[LayerParameters]:
    """Yield the layers of a model in its own order, without normalisation layers.

    Weights that a layer makes of others (parametrisations, weight normalisation) are given as those others:
    whether they can be masked is for the caller to judge.
    """
    for name, module in model.named_modules():
        kind = type(module).__name__
        if is_norm(module) and not isinstance(module, _LAYERS):
            continue
        is_layer = isinstance(module, _LAYERS) or kind.endswith(("Linear", "Conv1D"))
        is_attention = not is_layer and _is_attention(module)
        start = f"{name}." if name else ""
        matrices, biases = list[str](), list[str]()
        for attribute, parameter in module.named_parameters(recurse=False):
            is_weight = attribute.startswith("weight") if is_layer else attribute.endswith("weight")
            if not is_layer and not is_attention:
                continue
            if is_weight and parameter.ndim > 1 and (is_layer or parameter.ndim == 2):
                matrices.append(f"{start}{attribute}")
            elif attribute.endswith("bias") and parameter.ndim == 1:
                biases.append(f"{start}{attribute}")
        if is_layer and parametrize.is_parametrized(module):
            for attribute, parts in module.parametrizations.items():
                names = [f"{start}parametrizations.{attribute}.{key}" for key in parts._parameters]
                (matrices if attribute == "weight" else biases).extend(names)
        if matrices:
            yield LayerParameters(name, module, tuple(matrices), tuple(biases))


def find_parts(model: nn.Module) -> LayerParts:
    """Return the layers of a model by where they lie.

    Without repeated blocks (VGG, a plain MLP) everything but the classifier is the body.
    """
    layers = list(each_layer(model))
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    blocks = _find_blocks(model, layers)
    if not blocks:
        heads = tuple(layer for layer in layers if is_head(model, layer.name))
        return LayerParts((), tuple(layer for layer in layers if layer not in heads), (), heads)
    first, last = _span(model, blocks, layers)
    after_last = min(
        (place for name, place in order.items() if place > order[last] and not name.startswith(f"{last}.")),
        default=len(order),
    )
    stem, body, pool, head = (list[LayerParameters]() for _ in range(4))
    for layer in layers:
        place = order[layer.name]
        if place < order[first] or _reads_image(layer, layers[0]):
            stem.append(layer)
        elif place < after_last:
            body.append(layer)
        else:
            (head if is_head(model, layer.name) else pool).append(layer)
    return LayerParts(tuple(stem), tuple(body), tuple(pool), tuple(head))


def is_head(model: nn.Module, name: str) -> bool:
    """Return whether a module belongs to the classifier of a network, by the names that libraries use.

    This is the one place where names count: a classifier is a linear layer like any other. What is named so
    and holds attention (SigLIP's pooling under transformers) is none.
    """
    parts = name.split(".")
    places = [end for end in range(1, len(parts) + 1) if parts[end - 1] in _HEADS]
    if not any(part in _HEADS for part in plain(name).split(".")[:2]) or not places:
        return False
    holder = model.get_submodule(".".join(parts[: places[0]]))
    return not any(_is_attention(module) for module in holder.modules())


def _is_attention(module: nn.Module) -> bool:
    kind = type(module).__name__.lower()
    return "attention" in kind or "attn" in kind


def _find_blocks(model: nn.Module, layers: Sequence[LayerParameters]) -> list[str]:
    """Return the names of the outermost repeated blocks, in the model's own order."""
    counts = Counter[str]()  # matrices by module that holds them
    for layer in layers:
        parts = layer.name.split(".") if layer.name else []
        for end in range(len(parts) + 1):
            counts[".".join(parts[:end])] += len(layer.matrices)
    stacked = [
        child
        for module in model.modules()
        if is_stack(module)
        for child in module.children()
        if not isinstance(child, _CONTAINERS)
    ]
    named = {id(module): name for name, module in model.named_modules()}
    members = Counter(type(child) for child in stacked if counts[named[id(child)]] > 1)
    repeated = {kind for kind, number in members.items() if number > 1}
    found = list[str]()
    for name, module in model.named_modules():
        is_block = type(module) in repeated and counts[name] > 1
        if name and is_block and not (found and name.startswith(f"{found[-1]}.")):
            found.append(name)
    return found


def is_stack(module: nn.Module) -> bool:
    """Return whether a module's children stand one after the other: a container, or children of one type."""
    if isinstance(module, _CONTAINERS):
        return True
    types = [type(child) for child in module.children()]
    return len(types) > 1 and len(set(types)) == 1


def _span(model: nn.Module, blocks: Sequence[str], layers: Sequence[LayerParameters]) -> tuple[str, str]:
    """Return the first and the last child, of the module that holds all blocks, which belong to the body.

    Of a stack of stages, stages without a repeated block count too where they have two layers or more.
    """
    parts = [name.split(".") for name in blocks]
    depth = 0
    while (
        all(len(path) > depth + 1 for path in parts)
        and len({tuple(path[: depth + 1]) for path in parts}) == 1
    ):
        depth += 1
    holder = ".".join(parts[0][:depth])
    children = [".".join(path[: depth + 1]) for path in parts]
    if is_stack(model.get_submodule(holder)):
        start = f"{holder}." if holder else ""
        siblings = [f"{start}{name}" for name, _ in model.get_submodule(holder).named_children()]
        sizes = {
            name: sum(len(layer.matrices) for layer in layers if f"{layer.name}.".startswith(f"{name}."))
            for name in siblings
        }
        children = [name for name in siblings if sizes[name] > 1]
    return children[0], children[-1]


def _reads_image(layer: LayerParameters, first: LayerParameters) -> bool:
    """Return whether a layer is the model's first convolution, or one beside it on as few channels."""
    channels = _channels_of(layer.module)
    if channels is None or _channels_of(first.module) != channels:
        return False
    return layer is first or channels <= _FEW_CHANNELS


def _channels_of(module: nn.Module) -> int | None:
    """Return the channels that an ordinary convolution reads; None for other layers."""
    return module.in_channels if isinstance(module, nn.modules.conv._ConvNd) and module.groups == 1 else None
