"""The decoded bits of one parameter, and what becomes of them."""

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

_SPARSE = 32  # a parameter whose rare value takes less than one place in so many is kept as its places
_FUSED_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Layer:
    """The bits of one parameter on its device: the places of the rare value, or all of them packed."""

    places: Tensor | None  # int32
    rare: bool
    packed: Tensor | None  # uint8, eight bits each, the first in the highest place

    @property
    def num_bytes(self) -> int:
        """Return the memory that the bits take."""
        return sum(part.nbytes for part in (self.places, self.packed) if part is not None)


@dataclass(frozen=True)
class Change:
    """One parameter to rewrite: `theta` becomes a * `weight` * bits.

    scales: a of each part along the first dimension, as the weight's dtype rounds it.
    """

    theta: Tensor
    weight: Tensor
    layer: Layer
    scales: tuple[float, ...]


def decoded(bits: np.ndarray, weight: Tensor) -> Layer:
    """Return a layer out of flat bools, on the device of its weight."""
    ones = int(np.count_nonzero(bits))
    rare = ones < bits.size - ones
    if not is_fused(weight) and min(ones, bits.size - ones) * _SPARSE <= bits.size < 2**31:
        places = torch.from_numpy(np.flatnonzero(bits == rare).astype(np.int32)).to(weight.device)
        return Layer(places, rare, None)
    return Layer(None, rare, torch.from_numpy(np.packbits(bits)).to(weight.device))


def is_fused(weight: Tensor) -> bool:
    """Return whether the kernel rewrites it: on a CUDA device, in a dtype that it knows."""
    return weight.device.type == "cuda" and weight.dtype in _FUSED_DTYPES and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
