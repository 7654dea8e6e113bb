"""Whether a model's weights are those of a mask, in the precision that the mask was trained in or another.

A fingerprint is of exact values, so weights that were rounded to half precision have another one. A mask can
hold the fingerprints of its weights in half precision beside their own, and a model in full precision can be
rounded to see whether a mask was trained on it in half. Files that runs write do not hold them.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from selfmask_dist.backbones import fingerprint
from selfmask_dist.common.fingerprint import Digest

HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def fingerprints(named: Iterable[tuple[str, Tensor]], *, with_rounded: bool) -> tuple[str, dict[str, str]]:
    """Return the fingerprint of weights, and those of what they are in each half precision, by dtype.

    Args:
        named: in sorted order of their names; each is let go before the next is asked for.
        with_rounded: without, and of weights that are in half precision already, there are none.
    """
    own = Digest()
    rounded = {name: Digest() for name in HALVES} if with_rounded else {}
    for key, tensor in named:
        own.update(key, tensor)
        if tensor.dtype in HALVES.values():
            rounded = {}
        for name, found in rounded.items():
            found.update(key, tensor.to(HALVES[name]))
    return own.hexdigest(), {name: found.hexdigest() for name, found in rounded.items()}


def other_precision(
    weights: Mapping[str, Tensor], expected: str, found: str, rounded: Mapping[str, str]
) -> str | None:
    """Return how weights are the same as a mask's in another precision; None where they are not.

    Args:
        weights: of the model, by the mask's names.
        expected, found: fingerprints of the mask's weights and of these.
        rounded: what the mask has of `rounded_fingerprints`.
    """
    for name, dtype in HALVES.items():
        if rounded.get(name) == found:
            return f"the model is {name}, the mask was trained on float32"
        if all(tensor.dtype != dtype for tensor in weights.values()) and expected == fingerprint(
            (key, tensor.to(dtype)) for key, tensor in weights.items()
        ):
            return f"the mask was trained on {name}, the model is {_dtypes(weights)}"
    return None


def wrong_backbone(weights: Mapping[str, Tensor], found: str, expected: str) -> str:
    """Return the message of weights that are none of a mask's."""
    text = (
        f"wrong backbone: the model's weights under the mask have fingerprint {found[:12]}, the mask was "
        f"trained on {expected[:12]}"
    )
    if all(tensor.dtype in HALVES.values() for tensor in weights.values()):
        return (
            f"{text}. The model is {_dtypes(weights)}: rounded weights have another fingerprint, and this "
            f"file does not say which. Apply the mask to the same pretrained weights in float32, with no "
            f"mask applied yet, and convert the model then"
        )
    return f"{text}; load the same pretrained weights, with no mask applied yet"


def _dtypes(weights: Mapping[str, Tensor]) -> str:
    return ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in weights.values()}))
