"""Theta out of decoded bits, in place: theta = a * W * M for any number of parameters at once.

    layer = decoded(bits, weight)                    # once, as small as it can lie there
    rewrite([Change(theta, weight, layer, scales)])  # every time the mask is put on

Both ways give what `masking.core.materialize` gives: on a CPU vectorised passes (`passes`; zeros may have
another sign), on a GPU one fused kernel for all parameters (`kernel`) where Triton is there. Knows nothing of
names, files or caches.
"""

from selfmask_dist.rewrite.layer import Change, Layer, decoded
from selfmask_dist.rewrite.passes import rewrite

__all__ = ["Change", "Layer", "decoded", "rewrite"]
