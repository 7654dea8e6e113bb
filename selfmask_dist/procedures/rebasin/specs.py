"""Which units of an architecture may be permuted: MLPs, ResNets and ViTs (timm's names).

What leaves a network stays where it is: an encoder without a classifier keeps the order of its features.
"""

import copy
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from selfmask_dist.masking.selection import is_norm
from selfmask_dist.procedures.rebasin.permutation import Axis, Group, Probe, Spec, unfold

_RESNET = r"(conv1|bn1|fc)\.\w+|layer[1-4]\.\d+\.(conv\d|bn\d|downsample\.\d)\.\w+"
_VIT = (
    r"cls_token|reg_token|pos_embed|(patch_embed\.proj|norm_pre|norm|fc_norm|head)\.\w+|"
    r"blocks\.\d+\.(norm[12]|attn\.(qkv|proj|q_norm|k_norm)|mlp\.(fc1|fc2|norm)|ls[12])\.\w+"
)


def permutation_spec(model: nn.Module) -> Spec:
    """Return the groups of a Sequential MLP, a ResNet or a ViT (plain blocks of timm).

    Raises:
        ValueError: another architecture, or one with tensors that the rules here do not cover.
    """
    if isinstance(model, nn.Sequential):
        spec = mlp(model)
    elif hasattr(model, "layer1"):
        spec = resnet(model)
    elif hasattr(model, "blocks") and hasattr(model, "patch_embed"):
        spec = vit(model)
    else:
        raise ValueError(
            f"{type(model).__name__} is neither a Sequential MLP, a ResNet nor a ViT; write its groups of "
            f"units down as procedures.rebasin.permutation.Group"
        )
    _check_names(model, spec)
    return spec


def classifier_spec(encoder: nn.Module, head: nn.Linear, *, encoder_name: str, head_name: str) -> Spec:
    """Return the groups of an encoder and the linear head behind it, which are two modules of one network.

    Args:
        encoder_name, head_name: what they are called in it.
    """
    key = "fc" if hasattr(encoder, "layer1") else "head"
    with_head = copy.copy(encoder)
    with_head._modules = {**encoder._modules, key: head}

    def place(name: str) -> str:
        part, _, rest = name.partition(".")
        return f"{head_name}.{rest}" if part == key else f"{encoder_name}.{name}"

    return tuple(
        replace(
            group,
            axes=tuple(replace(axis, tensor=place(axis.tensor)) for axis in group.axes),
            probe=replace(group.probe, module=place(group.probe.module)),
        )
        for group in permutation_spec(with_head)
    )


def mlp(model: nn.Sequential) -> Spec:
    """Linear layers with activations and normalisation in between; hidden units are permuted."""
    linears = [name for name, module in model.named_children() if isinstance(module, nn.Linear)]
    order, groups = [name for name, _ in model.named_children()], []
    for name, following in itertools.pairwise(linears):
        between = order[order.index(name) + 1 : order.index(following)]
        norms = [n for n in between if is_norm(model.get_submodule(n))]
        axes = [*_out(model, name), *_norm(model, norms), Axis(f"{following}.weight", 1)]
        size = _size(model, name, "out_features")
        groups.append(Group(f"units {name}", size, tuple(axes), Probe(norms[-1] if norms else name, -1)))
    return tuple(groups)


def resnet(model: nn.Module) -> Spec:
    """Each block's inner channels, and each stage's stream of channels, which skip connections share.

    Basic and bottleneck blocks, of timm or torchvision; average-pooled shortcuts too. Refuses blocks with
    further parts (squeeze and excitation, anti-aliasing).
    """
    inner: list[Group] = []
    stem = [n for n, m in model.named_modules() if not n.startswith("layer") and isinstance(m, nn.Conv2d)]
    if len(stem) != 1:
        raise ValueError(f"a ResNet with {len(stem)} convolutions in its stem is not covered")
    size = _size(model, stem[0], "out_channels")
    stream = [*_out(model, stem[0]), *_norm(model, ["bn1"])]
    streams: list[Group] = []
    probe, block = Probe("bn1", 1), ""
    for block in (f"layer{s}.{name}" for s in range(1, 5) for name, _ in _children(model, f"layer{s}")):
        module: Any = model.get_submodule(block)
        convs = [f"{block}.{n}" for n, m in module.named_children() if isinstance(m, nn.Conv2d)]
        norms = [f"{block}.{n}" for n, m in module.named_children() if is_norm(m)]
        stream.append(Axis(f"{convs[0]}.weight", 1))
        for index, (conv, following) in enumerate(itertools.pairwise(convs)):
            axes = (*_out(model, conv), *_norm(model, [norms[index]]), Axis(f"{following}.weight", 1))
            channels = _size(model, conv, "out_channels")
            inner.append(Group(f"inside {conv}", channels, axes, Probe(norms[index], 1)))
        arriving = [*_out(model, convs[-1]), *_norm(model, [norms[-1]])]
        if module.downsample is not None:  # a new stream; the old one ends in the shortcut
            parts = [f"{block}.downsample.{name}" for name, _ in module.downsample.named_children()]
            shortcut = [n for n in parts if isinstance(model.get_submodule(n), nn.Conv2d)]
            stream.append(Axis(f"{shortcut[0]}.weight", 1))
            streams.append(Group(f"stream to {block}", size, tuple(stream), probe))
            size, probe = _size(model, convs[-1], "out_channels"), _stream_probe(module, block)
            stream = [*_out(model, shortcut[0]), *_norm(model, [n for n in parts if n not in shortcut])]
        stream += arriving
    if isinstance(getattr(model, "fc", None), nn.Linear):
        streams.append(Group("stream to fc", size, (*stream, Axis("fc.weight", 1)), probe))
    return (*streams, *inner)


def vit(model: nn.Module) -> Spec:
    """The residual stream (where a classifier follows), each block's heads and what is in them, and its
    hidden units.
    """
    groups, parameters = [], dict(model.named_parameters())
    width = parameters["patch_embed.proj.weight"].shape[0]
    stream = [*_out(model, "patch_embed.proj")]
    stream += [Axis(n, 2) for n in ("cls_token", "pos_embed", "reg_token") if n in parameters]
    stream += _norm(model, ["norm_pre"])
    block = ""
    for block in (f"blocks.{name}" for name, _ in _children(model, "blocks")):
        groups += _attention(model, f"{block}.attn")
        hidden = (*_out(model, f"{block}.mlp.fc1"), *_norm(model, [f"{block}.mlp.norm"]))
        axes = (*hidden, Axis(f"{block}.mlp.fc2.weight", 1))
        size = _size(model, f"{block}.mlp.fc1", "out_features")
        groups.append(Group(f"hidden {block}", size, axes, Probe(f"{block}.mlp.fc2", -1, is_input=True)))
        stream += [
            *_norm(model, [f"{block}.norm1", f"{block}.norm2"]),
            Axis(f"{block}.attn.qkv.weight", 1),
            Axis(f"{block}.mlp.fc1.weight", 1),
            *_out(model, f"{block}.attn.proj"),
            *_out(model, f"{block}.mlp.fc2"),
            *(Axis(f"{block}.{n}.gamma", 0) for n in ("ls1", "ls2") if f"{block}.{n}.gamma" in parameters),
        ]
    stream += _norm(model, ["norm", "fc_norm"])
    if isinstance(getattr(model, "head", None), nn.Linear):
        stream.append(Axis("head.weight", 1))
        groups.insert(0, Group("stream", width, tuple(stream), Probe(block, -1)))
    return tuple(groups)


def _attention(model: nn.Module, attention: str) -> list[Group]:
    """Heads, and within each its queries with their keys, and its values."""
    heads = _size(model, attention, "num_heads")
    size = _size(model, f"{attention}.proj", "in_features")
    # scales of normalised queries and keys are shared by all heads: there heads change places as they are
    width = size // heads if f"{attention}.q_norm.weight" in model.state_dict() else 1
    tensors = [axis.tensor for axis in _out(model, f"{attention}.qkv")]
    queries = Group(
        f"queries {attention}",
        size // width,
        tuple(Axis(tensor, 0, before=2, after=width, start=0) for tensor in tensors),
        Probe(f"{attention}.qkv", -1, before=2, after=width, start=0),
        blocks=heads,
        order=f"heads {attention}",
    )
    values = Group(
        f"values {attention}",
        size,
        (*(Axis(tensor, 0, start=2 * size) for tensor in tensors), Axis(f"{attention}.proj.weight", 1)),
        Probe(f"{attention}.proj", -1, is_input=True),
        blocks=heads,
        order=queries.order,
    )
    return [queries, values]


def _stream_probe(module: nn.Module, block: str) -> Probe:
    """Where a block's sum is seen before it is rectified: a unit that is never active tells nothing."""
    activations = [name for name, _ in module.named_children() if name.startswith(("act", "relu"))]
    return Probe(f"{block}.{activations[-1]}", 1, is_input=True) if activations else Probe(block, 1)


def _children(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    return model.get_submodule(name).named_children()


def _size(model: nn.Module, name: str, attribute: str) -> int:
    return int(getattr(model.get_submodule(name), attribute))


def _out(model: nn.Module, name: str) -> list[Axis]:
    module = model.get_submodule(name)
    if getattr(module, "groups", 1) != 1:
        raise ValueError(f"{name} is a grouped convolution, whose channels cannot be permuted freely")
    return [Axis(f"{name}.{key}", 0) for key, _ in module.named_parameters(recurse=False)]


def _norm(model: nn.Module, names: Sequence[str]) -> list[Axis]:
    """Weights, biases and running statistics of normalisation layers, of those that are there."""
    found, axes = dict(model.named_modules()), []
    for name in names:
        module = found.get(name)
        if isinstance(module, nn.GroupNorm):
            raise ValueError(f"{name} normalises groups of channels, which cannot be permuted freely")
        if module is not None:
            tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            axes += [Axis(f"{name}.{key}", 0) for key, tensor in tensors if tensor.ndim]
    return axes


def _check_names(model: nn.Module, spec: Spec) -> None:
    """Every parameter must be one that the rules know: an unknown one would make permuting wrong silently."""
    if isinstance(model, nn.Sequential):
        own = [n for n, m in model.named_children() if isinstance(m, nn.Linear) or is_norm(m)]
        known = "|".join(rf"{re.escape(name)}\.\w+" for name in own)
    else:
        known = _RESNET if hasattr(model, "layer1") else _VIT
    tensors = model.state_dict()
    if unknown := [name for name in tensors if not re.fullmatch(known, name)]:
        raise ValueError(
            f"{type(model).__name__} has parts that no rule here covers: {', '.join(unknown[:4])}; write its "
            f"groups of units down as procedures.rebasin.permutation.Group"
        )
    for group in spec:
        names = [axis.tensor for axis in group.axes]
        assert len(set(names)) == len(names), "a tensor with a group on two axes is a quadratic assignment"
        for axis in group.axes:
            unfold(tensors, group, axis)  # a gated MLP, whose two layers differ in width, ends here
