"""One vector an image out of an encoder's patches: the configuration's `backbone.pool`.

    model: the encoder's own, as it is built         mean: of all patches, or of the last map
    class: the class token                           both: class token and mean, one behind the other (n, 2 C)
    attention: the encoder's own attention pooling   map: none; one vector a patch (n, rows, columns, C)

Vectors are `tokens`' (after the last normalisation, before a projection). No parameter is added, taken away
or renamed: fingerprints, masks and patterns stay what they are.
"""

import re
from typing import Any

import torch
from torch import Tensor, nn

from selfmask_dist.backbones.tokens import dense_features, has_class_token, library_of, tokens_of

POOLS = ("model", "class", "mean", "both", "attention")  # of the configuration
_OWN = ("model", "attention")  # the encoder's forward as it is
_ATTENTION_POOLING = re.compile(r"Attention(al)?Pool")  # in the names of the libraries' modules
_KINDS: dict[tuple[type[nn.Module], str], type[nn.Module]] = {}  # made so far


def use_pool(encoder: nn.Module, pool: str, *, name: str) -> nn.Module:
    """Make an encoder's forward pool its patches in another way, in place; return it.

    Args:
        pool: see the head of this file.
        name: of the encoder, for messages.

    Raises:
        ValueError: an unknown way, or one for which the encoder has no class token or attention pooling.
    """
    if pool not in (*POOLS, "map"):
        raise ValueError(f"backbone.pool {pool!r} is not one of {', '.join(POOLS)}")
    if pool == "attention" and not has_attention_pooling(encoder):
        raise ValueError(
            f"backbone.pool=attention: {name} has no attention pooling (SigLIP and CLIP's ResNets have); "
            f"choose mean{', class or both' if has_class_token(encoder) else ''}"
        )
    if pool in _OWN:
        return encoder
    library_of(encoder)
    if pool in ("class", "both") and not has_class_token(encoder):
        raise ValueError(f"backbone.pool={pool}: {name} has no class token; choose mean or model")
    encoder.__class__ = _pooling(type(encoder), pool)
    return encoder


def has_attention_pooling(encoder: nn.Module) -> bool:
    """Return whether an encoder has a layer of its own that attends to all patches for one vector."""
    return any(_ATTENTION_POOLING.search(type(module).__name__) for module in encoder.modules())


def pool_of(encoder: nn.Module) -> str:
    """Return what `use_pool` made of an encoder; "model" where it was left as it is."""
    return str(getattr(type(encoder), "selfmask_pool", "model"))


def change_class(encoder: nn.Module, kind: type[nn.Module]) -> None:
    """Give an encoder the class `kind`, in place, and leave its pooling as it is."""
    pool = pool_of(encoder)
    encoder.__class__ = kind if pool == "model" else _pooling(kind, pool)


def _pooling(kind: type[nn.Module], pool: str) -> type[nn.Module]:
    """Return a kind of encoder whose forward pools; nothing else of it is another."""
    if (kind, pool) in _KINDS:
        return _KINDS[kind, pool]

    def forward(self: nn.Module, images: Tensor) -> Tensor:
        return dense_features(self, images) if pool == "map" else _pooled(self, images, pool)

    def reduce(self: nn.Module, _protocol: Any) -> tuple[Any, ...]:
        return _empty, (kind, pool), self.__dict__

    # the module of the library: what knows its models by their place knows these
    about: dict[str, Any] = {"forward": forward, "selfmask_pool": pool, "__module__": kind.__module__}
    about["__reduce_ex__"] = reduce  # pickle would look the class up in that module
    _KINDS[kind, pool] = type(kind.__name__, (kind,), about)
    return _KINDS[kind, pool]


def _empty(kind: type[nn.Module], pool: str) -> nn.Module:
    """Return such an encoder before its parts are in: pickle and copy put them there."""
    made = _pooling(kind, pool)
    encoder: nn.Module = made.__new__(made)
    return encoder


def _pooled(encoder: nn.Module, images: Tensor, pool: str) -> Tensor:
    found = tokens_of(encoder, images)
    parts = []
    if pool in ("class", "both"):
        assert found.class_token is not None
        parts.append(found.norm(found.class_token))
    if pool in ("mean", "both"):
        parts.append(found.norm(found.patches.mean(dim=(1, 2))))
    return torch.cat(parts, dim=1)
