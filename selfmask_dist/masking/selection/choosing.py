"""Which parameters get a mask: by the structure of the model, by the paper's rules, or by glob patterns.

`structure` takes what `layers` finds inside the repeated blocks. `vit` and `resnet` are the paper's rules for
its architectures, as patterns over names; `auto` takes one of them where it fits, and `structure` elsewhere.
Normalisation layers are refused unless asked for: masking them takes k-NN on CIFAR-10 from 0.921 to 0.560
(paper, appendix Table 1b).

Knows nothing of scores, files or process groups.
"""

import difflib
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import TypedDict

from torch import nn

from selfmask_dist.common.tensor_names import plain
from selfmask_dist.common.text import some
from selfmask_dist.masking.selection.layers import LayerParameters, LayerParts, find_parts, is_norm

_VIT = (
    # timm
    "*attn.qkv.*",
    "*attn.[qkv].*",
    "*attn.proj.*",
    "*mlp.fc[12].*",
    # open_clip and nn.MultiheadAttention, whose projections are bare parameters
    "*attn.in_proj_*",
    "*attn.[qkv]_proj_weight",
    "*attn.out_proj.*",
    "*mlp.c_fc.*",
    "*mlp.c_proj.*",
    # Hugging Face
    "*attn.[qkv]_proj.*",
)

PRESETS: dict[str, tuple[str, ...]] = {
    "vit": _VIT,  # q, k, v, out projections and both MLP layers, weights and biases
    "clip_visual": tuple(f"visual.{pattern}" for pattern in _VIT),  # the image tower of a whole CLIP model
    "resnet": ("*conv*.weight", "*downsample*.weight"),  # convolutions and downsample layers
}
# read from the module tree; see `layers`
STRUCTURAL: dict[str, Callable[[LayerParts], list[str]]] = {
    "structure": lambda parts: _names(parts.body),  # weights and biases inside the repeated blocks
    "matrices": lambda parts: _names(parts.body, biases=False),  # the same without biases
    "stem": lambda parts: _names(parts.stem),  # patch embedding, first convolutions
    "pool": lambda parts: _names(parts.pool),  # after the blocks: attention pooling, last convolutions
}
PRESET_NAMES = ("auto", *PRESETS, *STRUCTURAL)
ENOUGH = 0.95  # of the matrices inside the blocks: where a paper's rule takes that much, it fits


class Selection(TypedDict, total=False):
    """Which parameters of a model get a mask: the arguments of `select`, as `attach` hands them on."""

    include: str | Sequence[str]
    exclude: str | Sequence[str]
    first_layers: int | None
    allow_norm: bool


def norm_parameters(model: nn.Module) -> set[str]:
    """Return the full names of the parameters that normalisation layers own."""
    return {
        f"{module_name}.{name}" if module_name else name
        for module_name, module in model.named_modules()
        if is_norm(module)
        for name, _ in module.named_parameters(recurse=False)
    }


def adapter_parameters(model: nn.Module) -> set[str]:
    """Return the full names of the parameters that stand beside a layer's own, as LoRA's in PEFT."""
    around = [f"{name}." for name, module in model.named_modules() if "base_layer" in module._modules]
    return {
        name
        for name, _ in model.named_parameters()
        if any(name.startswith(start) and not name.startswith(f"{start}base_layer.") for start in around)
    }


def select(
    model: nn.Module,
    include: str | Sequence[str] = "auto",
    *,
    exclude: str | Sequence[str] = (),
    first_layers: int | None = None,
    allow_norm: bool = False,
) -> list[str]:
    """Return the names of the parameters to mask, in the model's own order.

    Args:
        include: preset names and glob patterns over full parameter names. `structure` is every weight and
            bias of the layers inside the repeated blocks, `matrices` the same without biases; `stem` and
            `pool` are the layers before and after them, never the classifier. `vit`, `resnet` and
            `clip_visual` are the paper's rules. `auto` is `vit` or `resnet` where that takes 95 % of the
            weights of `matrices`, and all or nothing of `pool`; else `structure`.
        exclude: glob patterns taken out again.
        first_layers: of what is chosen, keep the parameters of so many layers, the first in the model's
            order; a layer is a module that owns chosen parameters. None: all.
        allow_norm: also mask parameters of normalisation layers that a pattern names.

    Raises:
        ValueError: a pattern matches nothing, a pattern matches a normalisation layer, or nothing is left.
    """
    names = [name for name, _ in model.named_parameters()]
    if not as_tuple(include):
        raise ValueError("include is empty; give a preset (auto) or patterns of parameters' names")
    norms = set() if allow_norm else norm_parameters(model)
    adapters = adapter_parameters(model)
    chosen: set[str] = set()
    for pattern in as_tuple(include):
        packed = _quantized(model)
        if packed and (pattern == "auto" or pattern in STRUCTURAL):  # else what is left would be all there is
            raise ValueError(f"include {pattern!r} finds no parameter of some layers{packed}")
        matched = _expand(pattern, names, model)
        if pattern in PRESET_NAMES:
            matched -= norms | adapters  # a preset describes a family; these are left out silently
        elif matched & norms:
            raise ValueError(
                f"include pattern {pattern!r} would mask normalisation layers: "
                f"{some(sorted(matched & norms), 6)}. Masking them "
                f"destroys the features; exclude them by name, or pass allow_norm=True if that is what you "
                f"want"
            )
        if not matched:
            raise ValueError(f"include {pattern!r} matches no parameter; {_hint(pattern, names)}{packed}")
        chosen |= matched
    for pattern in as_tuple(exclude):
        removed = {name for name in names if _matches(name, pattern)}
        if not removed:
            raise ValueError(f"exclude {pattern!r} matches no parameter; {_hint(pattern, names)}")
        chosen -= removed
    if not chosen:
        raise ValueError(
            f"no parameter is left to mask: exclude {list(as_tuple(exclude))} removes all that include "
            f"matched"
        )
    ordered = [name for name in names if name in chosen]
    if first_layers is None:
        return ordered
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in ordered))
    if not 1 <= first_layers <= len(layers):
        raise ValueError(f"first_layers {first_layers} is not from 1 to {len(layers)}, the layers to mask")
    return [name for name in ordered if name.rpartition(".")[0] in layers[:first_layers]]


def is_fused_qkv(name: str) -> bool:
    """Return whether the parameter holds q, k and v stacked along dimension 0."""
    return any(fnmatchcase(name, pattern) for pattern in ("*attn.qkv.*", "*attn.in_proj_*", "*.in_proj_*"))


def rule_of(model: nn.Module) -> str:
    """Return the preset that `auto` stands for on this model: `vit`, `resnet` or `structure`."""
    names = [name for name, _ in model.named_parameters()]
    parameters = dict(model.named_parameters())
    parts = find_parts(model)
    sizes = {name: parameters[name].numel() for name in _names(parts.body, biases=False)}
    after = set(_names(parts.pool, biases=False))
    for preset in ("vit", "resnet"):
        matched = _expand(preset, names, model)
        taken = sum(size for name, size in sizes.items() if name in matched)
        # half of an attention pooling, by names that are like those in blocks, is nobody's rule
        is_whole = len(after & matched) in (0, len(after))
        if matched and is_whole and taken >= ENOUGH * sum(sizes.values()):
            return preset
    return "structure"


def _expand(pattern: str, names: list[str], model: nn.Module) -> set[str]:
    if pattern == "auto":
        pattern = rule_of(model)
    if pattern in STRUCTURAL:
        return set(STRUCTURAL[pattern](find_parts(model)))
    globs = PRESETS.get(pattern, (pattern,))
    return {name for name in names if any(_matches(name, glob) for glob in globs)}


def _names(layers: Sequence[LayerParameters], *, biases: bool = True) -> list[str]:
    return [name for layer in layers for name in (*layer.matrices, *(layer.biases if biases else ()))]


def _matches(name: str, glob: str) -> bool:
    """Return whether a name fits, as it is or without the parts that a wrapper adds."""
    return fnmatchcase(name, glob) or fnmatchcase(plain(name), glob)


def as_tuple(patterns: str | Sequence[str]) -> tuple[str, ...]:
    """Return patterns as a tuple, one alone too.

    Raises:
        TypeError: something is no text.
    """
    if isinstance(patterns, str):
        return (patterns,)
    found = tuple(patterns) if isinstance(patterns, Iterable) else (None,)
    if not all(isinstance(one, str) for one in found):
        raise TypeError(f"include and exclude take text or a list of texts, and not {patterns!r}")
    return found


def _quantized(model: nn.Module) -> str:
    """Return a sentence on layers whose weights are no parameters, as they are quantized; empty for none."""
    found = [name for name, module in model.named_modules() if ".quantized." in type(module).__module__]
    if not found:
        return ""
    return f". The weights of {some(found, 3)} are quantized and packed: attach before quantizing"


def _hint(pattern: str, names: list[str]) -> str:
    if not names:
        return "the model has no parameters"
    if any(name.startswith(f"{pattern}.") for name in names):
        return f"it is a module; {pattern}.* names its parameters"
    near = difflib.get_close_matches(pattern, PRESET_NAMES, n=1) or difflib.get_close_matches(
        pattern, names, n=3, cutoff=0.4
    )
    listing = f"nearest: {some(near)}; " if near else ""
    return f"{listing}presets are {', '.join(PRESET_NAMES)}; the model's parameters are {some(names, 6)}"
