"""A head and what belongs to it, as a mask file carries them.

    linear   logits = W n(x) + b       n: none, l2 (x scaled to length s), batchnorm ((x - mean) / std)
    cosine   logits = s T x / |x|      T: text embeddings of the classes, s: CLIP's scale

and of a regression, each number y = out_std * z + out_mean in its own units, z such a logit.

The same operations in the same order as `objectives.supervised`, so that logits are equal bit for bit. Knows
no bytes, no training and no configuration.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

KINDS = ("linear", "cosine")
PARTS = ("weight", "bias", "mean", "var", "out_mean", "out_std")
NORMS = ("none", "l2", "batchnorm")
TARGETS = ("class", "multilabel", "regression", "dense")
BATCHNORM_EPS = 1e-5


@dataclass(frozen=True)
class Head:
    """Features (n, dim) to logits (n, classes); see the module's docstring.

    kind: one of `KINDS`. norm: one of `NORMS`; `none` of a cosine head, which has its own.
    weight: float32 (classes, dim): W or T. bias: (classes,), or None.
    mean, var: (dim,), of the norm `batchnorm` alone. scale: s, for `l2` and for `cosine`; else 1.
    target: what the logits stand for, one of `TARGETS`: one of the classes, each class by itself, numbers, or
        the class of each patch.
    out_mean, out_std: (classes,), of the target `regression` alone.

    Raises ValueError for parts that do not fit each other.
    """

    kind: str
    weight: Tensor
    bias: Tensor | None = None
    norm: str = "none"
    mean: Tensor | None = None
    var: Tensor | None = None
    scale: float = 1.0
    target: str = "class"
    out_mean: Tensor | None = None
    out_std: Tensor | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS or self.norm not in NORMS:
            raise ValueError(f"unknown head {self.kind!r} with norm {self.norm!r}")
        if self.weight.ndim != 2 or not self.weight.numel():
            raise ValueError(f"a head has weights of shape {tuple(self.weight.shape)}, not (classes, dim)")
        classes, dim = self.weight.shape
        if self.target not in TARGETS:
            raise ValueError(f"a head for the unknown target {self.target!r}; a newer version may know it")
        has_norm, is_scaled = self.norm == "batchnorm", self.target == "regression"
        for name, size, is_due in (
            ("bias", classes, self.bias is not None),
            ("mean", dim, has_norm),
            ("var", dim, has_norm),
            ("out_mean", classes, is_scaled),
            ("out_std", classes, is_scaled),
        ):
            part = getattr(self, name)
            if is_due != (part is not None) or (part is not None and tuple(part.shape) != (size,)):
                found = "none" if part is None else str(tuple(part.shape))
                raise ValueError(f"a head's {name} has shape {found}; {size if is_due else 'none'} is due")
        if self.kind == "cosine" and (self.bias is not None or self.norm != "none"):
            raise ValueError("a cosine head has neither bias nor norm")
        for name, part in self.tensors().items():
            if part.dtype != torch.float32 or not part.isfinite().all():
                raise ValueError(f"a head's {name} is not finite float32")
        if not 0 < self.scale < float("inf") or (self.var is not None and bool((self.var < 0).any())):
            raise ValueError("a head's scale is not above 0, or a variance is below")

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that there are, by name."""
        parts = {name: getattr(self, name) for name in PARTS}
        return {name: part for name, part in parts.items() if part is not None}

    def to(self, device: torch.device | str) -> "Head":
        """Return the same head on a device."""
        moved = {name: part.to(device) for name, part in self.tensors().items()}
        return Head(self.kind, norm=self.norm, scale=self.scale, target=self.target, **moved)

    def logits(self, features: Tensor) -> Tensor:
        """Return logits (n, classes), float32, of features (n, dim); of a regression the numbers themselves,
        and with the target `dense` (n, rows, columns, classes) of patches (n, rows, columns, dim).

        Raises:
            ValueError: features are of another length.
        """
        if features.shape[-1] != self.weight.shape[1]:
            raise ValueError(
                f"the head takes features of length {self.weight.shape[1]}, the encoder gives "
                f"{features.shape[-1]}; it is of another backbone"
            )
        with torch.autocast(features.device.type, enabled=False):
            features = features.float()
            if self.kind == "cosine":
                return self.scale * F.normalize(features, dim=1) @ self.weight.T
            if self.norm == "l2":
                features = F.normalize(features, dim=-1) * self.scale
            elif self.mean is not None and self.var is not None:
                features = (features - self.mean) * (self.var + BATCHNORM_EPS).rsqrt()
            logits = F.linear(features, self.weight, self.bias)
            if self.out_mean is not None and self.out_std is not None:
                return logits * self.out_std + self.out_mean
            return logits


@dataclass(frozen=True)
class Model:
    """What a mask needs to answer with a class.

    head: None where the file only says how its backbone is built.
    classes: a name for each row of the head, in order.
    backbone: the keys of the configuration's section `backbone` that are not at their defaults, and `seed`
        where weights are random. A weights file is there by its name, without its folder.
    pooling: how the encoder pools its tokens, in its library's word; empty where it has none.
    licence: under which the mask may be used; empty where it is not stated.
    provenance: where it comes from, as texts by name.
    """

    head: Head | None
    classes: tuple[str, ...] = ()
    backbone: dict[str, Any] = field(default_factory=dict)
    pooling: str = ""
    licence: str = ""
    provenance: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows = 0 if self.head is None else len(self.head.weight)
        if rows != len(self.classes):
            raise ValueError(f"a head of {rows} classes comes with {len(self.classes)} names of classes")
