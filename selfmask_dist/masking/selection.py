"""Which parameters get a mask: glob patterns over parameter names, presets for common families, and guards.

A mask belongs to a parameter, not to a module type, so a fused `qkv`, a bare `in_proj_weight` and a
convolution are all selected the same way. Normalisation layers are refused unless asked for: masking them
takes k-NN on CIFAR-10 from 0.921 to 0.560 (paper, appendix Table 1b).

Knows nothing of scores, files or process groups.
"""

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TypedDict

from torch import nn

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


class Selection(TypedDict, total=False):
    """Which parameters of a model get a mask: the arguments of `select`, as `attach` hands them on."""

    include: str | Sequence[str]
    exclude: str | Sequence[str]
    first_layers: int | None
    allow_norm: bool


def is_norm(module: nn.Module) -> bool:
    """Return whether `module` normalises: batch, layer, group, RMS, ... and timm's norm-activation layers."""
    return "norm" in type(module).__name__.lower()


def norm_parameters(model: nn.Module) -> set[str]:
    """Return the full names of the parameters that normalisation layers own."""
    return {
        f"{module_name}.{name}" if module_name else name
        for module_name, module in model.named_modules()
        if is_norm(module)
        for name, _ in module.named_parameters(recurse=False)
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
        include: preset names (`auto`, `vit`, `resnet`, `clip_visual`) and glob patterns over full parameter
            names. `auto` is `vit` where that matches anything, else `resnet`.
        exclude: glob patterns taken out again.
        first_layers: of what is chosen, keep the parameters of so many layers, the first in the model's
            order; a layer is a module that owns chosen parameters. None: all.
        allow_norm: also mask parameters of normalisation layers that a pattern names.

    Raises:
        ValueError: a pattern matches nothing, a pattern matches a normalisation layer, or nothing is left.
    """
    names = [name for name, _ in model.named_parameters()]
    norms = set() if allow_norm else norm_parameters(model)
    chosen: set[str] = set()
    for pattern in _as_tuple(include):
        matched = _expand(pattern, names)
        if pattern in PRESETS or pattern == "auto":
            matched -= norms  # a preset describes a family; its norms are left out silently
        elif matched & norms:
            raise ValueError(
                f"include pattern {pattern!r} would mask normalisation layers: "
                f"{_some(sorted(matched & norms))}. Masking them "
                f"destroys the features; exclude them by name, or pass allow_norm=True if that is what you "
                f"want"
            )
        if not matched:
            raise ValueError(f"include {pattern!r} matches no parameter; {_hint(pattern, names)}")
        chosen |= matched
    for pattern in _as_tuple(exclude):
        removed = {name for name in names if fnmatchcase(name, pattern)}
        if not removed:
            raise ValueError(f"exclude {pattern!r} matches no parameter; {_hint(pattern, names)}")
        chosen -= removed
    if not chosen:
        raise ValueError(
            f"no parameter is left to mask: exclude {list(_as_tuple(exclude))} removes all that include "
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
    return fnmatchcase(name, "*attn.qkv.*") or fnmatchcase(name, "*attn.in_proj_*")


def _expand(pattern: str, names: list[str]) -> set[str]:
    if pattern == "auto":
        return _expand("vit", names) or _expand("resnet", names)
    globs = PRESETS.get(pattern, (pattern,))
    return {name for name in names if any(fnmatchcase(name, glob) for glob in globs)}


def _as_tuple(patterns: str | Sequence[str]) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _hint(pattern: str, names: list[str]) -> str:
    if not names:
        return "the model has no parameters"
    near = difflib.get_close_matches(pattern, [*PRESETS, "auto"], n=1) or difflib.get_close_matches(
        pattern, names, n=3, cutoff=0.4
    )
    listing = f"nearest: {_some(near)}; " if near else ""
    return f"{listing}presets are auto, {', '.join(PRESETS)}; the model's parameters are {_some(names)}"


def _some(names: Sequence[str], limit: int = 6) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
