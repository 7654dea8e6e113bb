"""Parameters to rewrite and what theta must be, without what takes long to import."""

import torch
from torch import Tensor

from selfmask_dist.maskfile.layers import Change, decoded
from selfmask_dist.masking import core

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def cases(dtype: torch.dtype, device: str = "cpu") -> tuple[list[Change], list[Tensor]]:
    """Parameters of many shapes, of which few, many, all and no weights are kept, and their thetas."""
    generator = torch.Generator().manual_seed(0)
    changes, expected = [], []
    for shape, parts, share in (
        ((30, 7), 3, 0.4),
        ((30, 7), 3, 0.99),
        ((5,), 1, 0.5),
        ((9000,), 1, 0.01),
        ((9001,), 1, 0.995),
        ((12, 3, 3, 3), 1, 0.7),
        ((4, 4), 1, 0.0),
        ((4, 4), 1, 1.0),
    ):
        weight = torch.randn(shape, generator=generator).to(device, dtype)
        weight.view(-1)[:2] = torch.tensor([-0.0, 1e-7])  # a subnormal in float16
        mask = (torch.rand(shape, generator=generator) < share).to(device)
        pieces = list(zip(weight.chunk(parts), mask.chunk(parts), strict=True))
        scales = [core.scale_factor(core.count_kept(kept), kept.numel(), dtype) for _, kept in pieces]
        layer = decoded(mask.cpu().numpy().reshape(-1), weight)
        theta = torch.full_like(weight, 7.0)
        changes.append(Change(theta, weight, layer, tuple(float(scale) for scale in scales)))
        expected.append(torch.cat([core.materialize(*piece) for piece in pieces]))
    return changes, expected
