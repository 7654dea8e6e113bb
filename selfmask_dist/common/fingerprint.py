"""The fingerprint of named tensors: which weights they are, on any device and in any layout."""

import hashlib
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

_COUNTER = "num_batches_tracked"  # BatchNorm counts steps; no forward pass reads it


class Digest:
    """A fingerprint that takes tensors one after the other, so that they need not be there together."""

    def __init__(self) -> None:
        self._found = hashlib.sha256()

    def update(self, name: str, tensor: "Tensor") -> None:
        """Take a tensor in; one after the other in sorted order of their names."""
        if name.endswith(_COUNTER):
            return
        self._found.update(json.dumps([name, list(tensor.shape)]).encode())
        values = tensor.detach().cpu().float().numpy()
        self._found.update(np.ascontiguousarray(values, dtype="<f4").reshape(-1).data)

    def hexdigest(self) -> str:
        """Return what `digest` returns of the same tensors."""
        return self._found.hexdigest()


def digest(named: Iterable[tuple[str, "Tensor"]]) -> str:
    """Return the SHA-256 (hex) over names, shapes and little-endian float32 values, in the order given.

    The same for fp16 and fp32 copies of equal values and on any device. `num_batches_tracked` is left out.
    """
    found = Digest()
    for name, tensor in named:
        found.update(name, tensor)
    return found.hexdigest()
