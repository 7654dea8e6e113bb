"""One kernel that rewrites every parameter of a mask: unpack bits, times W, times scale, in one pass.

    theta[i] = (W[i] * bit[i]) * a        i over one part of one parameter; a grid of parts x blocks

A launch for each of a hundred parameters would take longer than their bytes, so where the parts lie is a
table that the kernel reads. Products are rounded to the weight's dtype one by one, as
`masking.core.materialize` rounds them: the result is bit-equal. Needs Triton.
"""

import contextlib
from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from selfmask_dist.maskfile.layers import Change

BLOCK = 4096
# of the table: addresses of theta, W and bits; first element, number of elements; bits of the float64 scale
_COLUMNS = 6
_KINDS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}


@triton.jit
def _kernel(table, COLUMNS: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = table + tl.program_id(1) * COLUMNS
    size = tl.load(row + 4)
    within = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = within < size
    at = tl.load(row + 3) + within
    bits = tl.load(tl.load(row + 2).to(tl.pointer_type(tl.uint8)) + at // 8, mask=inside, other=0)
    kept = (bits.to(tl.int32) >> (7 - at % 8).to(tl.int32)) & 1
    scale = tl.load(row + 5).to(tl.float64, bitcast=True)
    if KIND == "bf16":
        # in whole numbers: bf16 is the upper half of a float32, rounded to the nearest, ties to even
        weight = tl.load(tl.load(row + 1).to(tl.pointer_type(tl.uint16)) + at, mask=inside, other=0)
        wide = (weight.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
        product = (wide * kept.to(tl.float32) * scale.to(tl.float32)).to(tl.uint32, bitcast=True)
        rounded = (product + 0x7FFF + ((product >> 16) & 1)) >> 16
        is_nan = (product & 0x7FFFFFFF) > 0x7F800000
        theta = tl.where(is_nan, (product >> 16) | 0x40, rounded).to(tl.uint16)
        tl.store(tl.load(row).to(tl.pointer_type(tl.uint16)) + at, theta, mask=inside)
    elif KIND == "fp16":
        weight = tl.load(tl.load(row + 1).to(tl.pointer_type(tl.float16)) + at, mask=inside, other=0.0)
        theta = (weight.to(tl.float32) * kept.to(tl.float32) * scale.to(tl.float32)).to(tl.float16)
        tl.store(tl.load(row).to(tl.pointer_type(tl.float16)) + at, theta, mask=inside)
    elif KIND == "fp32":
        weight = tl.load(tl.load(row + 1).to(tl.pointer_type(tl.float32)) + at, mask=inside, other=0.0)
        theta = weight * kept.to(tl.float32) * scale.to(tl.float32)
        tl.store(tl.load(row).to(tl.pointer_type(tl.float32)) + at, theta, mask=inside)
    else:
        weight = tl.load(tl.load(row + 1).to(tl.pointer_type(tl.float64)) + at, mask=inside, other=0.0)
        theta = weight * kept.to(tl.float64) * scale
        tl.store(tl.load(row).to(tl.pointer_type(tl.float64)) + at, theta, mask=inside)


def rewrite_fused(changes: Sequence[Change]) -> None:
    """Rewrite every theta in place, all on one device: one launch for each dtype among them."""
    contiguous = [change.theta.contiguous() for change in changes]
    by_dtype: dict[torch.dtype, list[tuple[Change, Tensor]]] = {}
    for change, theta in zip(changes, contiguous, strict=True):
        by_dtype.setdefault(theta.dtype, []).append((change, theta))
    device = contiguous[0].device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for dtype, group in by_dtype.items():
            rows = _rows(group)
            largest = int(rows[:, 4].max(initial=0))
            table = torch.from_numpy(rows).to(device, non_blocking=True)
            if largest:
                grid = (triton.cdiv(largest, BLOCK), len(rows))
                _kernel[grid](table, COLUMNS=_COLUMNS, KIND=_KINDS[dtype], BLOCK=BLOCK)
    for change, theta in zip(changes, contiguous, strict=True):
        if theta is not change.theta:
            change.theta.copy_(theta)
    # autograd does not see what a kernel writes
    torch.autograd.graph.increment_version([change.theta for change in changes])


def _rows(group: Sequence[tuple[Change, Tensor]]) -> np.ndarray:
    """Return a row of the table for each part, (parts, columns) int64; in numpy, as a swap waits for it."""
    rows: list[tuple[int, ...]] = []
    scales: list[float] = []
    for change, theta in group:
        assert change.layer.packed is not None
        addresses = (theta.data_ptr(), change.weight.data_ptr(), change.layer.packed.data_ptr())
        size, parts = theta.numel(), len(change.scales)
        # as `chunk` cuts along the first dimension
        step = size if parts == 1 else -(-len(theta) // parts) * (size // max(len(theta), 1))
        rows += [(*addresses, start, min(step, size - start)) for start in range(0, size, max(step, 1))]
        scales += change.scales[: len(rows) - len(scales)]
    table = np.empty((len(rows), _COLUMNS), dtype=np.int64)
    table[:, :-1] = np.array(rows, dtype=np.int64).reshape(-1, _COLUMNS - 1)
    table[:, -1] = np.array(scales, dtype=np.float64).view(np.int64)
    return table
