"""The fingerprint of named tensors: which weights they are, on any device and in any layout."""

import hashlib
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

_COUNTER = "num_batches_tracked"  # BatchNorm counts steps; no forward pass reads it


def digest(named: Iterable[tuple[str, "Tensor"]]) -> str:
    """Return the SHA-256 (hex) over names, shapes and little-endian float32 values, in the order given.

    The same for fp16 and fp32 copies of equal values and on any device. `num_batches_tracked` is left out.
    """
    found = hashlib.sha256()
    for name, tensor in named:
        if name.endswith(_COUNTER):
            continue
        found.update(json.dumps([name, list(tensor.shape)]).encode())
        values = tensor.detach().cpu().float().numpy()
        found.update(np.ascontiguousarray(values, dtype="<f4").reshape(-1).data)
    return found.hexdigest()
