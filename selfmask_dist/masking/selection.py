"""Which parameters get a mask: glob patterns over parameter names, presets for common families, and guards.

A mask belongs to a parameter, not to a module type, so a fused `qkv`, a bare `in_proj_weight` and a
convolution are all selected the same way. Normalisation layers are refused unless asked for: masking them
takes k-NN on CIFAR-10 from 0.921 to 0.560 (paper, appendix Table 1b).

Knows nothing of scores, files or process groups.
"""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypedDict

from torch import nn

from selfmask_dist.common.tensor_names import plain

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
    """Return whether `module` normalises: batch, layer, group, RMS, ... and timm's norm-activation layers.

    By the name of its type, or by the running statistics that it owns.
    """
    return "norm" in type(module).__name__.lower() or "running_mean" in module._buffers


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
    if not _as_tuple(include):
        raise ValueError("include is empty; give a preset (auto) or patterns of parameters' names")
    norms = set() if allow_norm else norm_parameters(model)
    adapters = adapter_parameters(model)
    chosen: set[str] = set()
    for pattern in _as_tuple(include):
        matched = _expand(pattern, names)
        if pattern in PRESETS or pattern == "auto":
            matched -= norms | adapters  # a preset describes a family; these are left out silently
        elif matched & norms:
            raise ValueError(
                f"include pattern {pattern!r} would mask normalisation layers: "
                f"{_some(sorted(matched & norms))}. Masking them "
                f"destroys the features; exclude them by name, or pass allow_norm=True if that is what you "
                f"want"
            )
        if not matched:
            raise ValueError(
                f"include {pattern!r} matches no parameter; {_hint(pattern, names)}{_quantized(model)}"
            )
        chosen |= matched
    for pattern in _as_tuple(exclude):
        removed = {name for name in names if _matches(name, pattern)}
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
    return {name for name in names if any(_matches(name, glob) for glob in globs)}


def _matches(name: str, glob: str) -> bool:
    """Return whether a name fits, as it is or without the parts that a wrapper adds."""
    return fnmatchcase(name, glob) or fnmatchcase(plain(name), glob)


def _as_tuple(patterns: str | Sequence[str]) -> tuple[str, ...]:
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
    return f". The weights of {_some(found, 3)} are quantized and packed: attach before quantizing"


def _hint(pattern: str, names: list[str]) -> str:
    if not names:
        return "the model has no parameters"
    if any(name.startswith(f"{pattern}.") for name in names):
        return f"it is a module; {pattern}.* names its parameters"
    near = difflib.get_close_matches(pattern, [*PRESETS, "auto"], n=1) or difflib.get_close_matches(
        pattern, names, n=3, cutoff=0.4
    )
    listing = f"nearest: {_some(near)}; " if near else ""
    return f"{listing}presets are auto, {', '.join(PRESETS)}; the model's parameters are {_some(names)}"


def _some(names: Sequence[str], limit: int = 6) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


# ---- how much of a model it is

_HEADS = ("head", "heads", "head_dist", "fc", "classifier", "classif", "last_linear", "logits")
_LAYERS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.MultiheadAttention)


@dataclass(frozen=True)
class Coverage:
    """How much of a model's matrices carries a mask; matrices are the weights of linear layers,
    convolutions and attention projections, without the classifier.

    num_tensors, num_weights: under a mask, biases too.
    masked, total: weights of matrices, under a mask and in all.
    left_out: names of the other matrices, the largest first.
    """

    num_tensors: int
    num_weights: int
    masked: int
    total: int
    left_out: tuple[str, ...]

    @property
    def share(self) -> float:
        """Return the share of the matrices' weights that is masked, 0 to 1; 1 where there are none."""
        return self.masked / self.total if self.total else 1.0

    def __str__(self) -> str:
        return f"{self.num_tensors} tensors, {self.num_weights:,} weights, {self.describe_matrices()}"

    def describe_matrices(self) -> str:
        """Return the share of the matrices, and what is left out, as a part of a line."""
        text = f"{self.share:.1%} of the matrices' weights masked"
        return f"{text}; left out {_some(self.left_out, 3)}" if self.left_out else text


def measure_coverage(model: nn.Module, names: Sequence[str], *, below: str = "") -> Coverage:
    """Return how much of the model's matrices the parameters `names` are.

    Args:
        below: count matrices whose plain names start with this, such as `visual.`.
    """
    chosen, sizes, masked, num_weights = set(names), dict[str, int](), 0, 0
    for module_name, module in model.named_modules():
        is_layer = isinstance(module, _LAYERS) or type(module).__name__.endswith(("Linear", "Conv1D"))
        for attribute, parameter in module.named_parameters(recurse=False):
            name = f"{module_name}.{attribute}" if module_name else attribute
            num_weights += parameter.numel() if name in chosen else 0
            short = plain(name)
            is_head = any(part in _HEADS for part in short.split(".")[:2])
            if is_layer and parameter.ndim > 1 and short.startswith(below) and not is_head:
                sizes[name] = parameter.numel()
                masked += parameter.numel() if name in chosen else 0
    left_out = sorted((name for name in sizes if name not in chosen), key=lambda name: -sizes[name])
    return Coverage(len(chosen), num_weights, masked, sum(sizes.values()), tuple(left_out))


def uncovered(model: nn.Module, include: str | Sequence[str]) -> Coverage | None:
    """Return what presets cover of a model, where that is less than half of its matrices; else None.

    Patterns of one's own are a choice and are never judged.
    """
    patterns = _as_tuple(include)
    if not all(pattern in PRESETS or pattern == "auto" for pattern in patterns):
        return None
    below = "visual." if all(pattern == "clip_visual" for pattern in patterns) else ""
    found = measure_coverage(model, select(model, include), below=below)
    return found if found.share < 0.5 else None
