"""A fine-tuned network as one bit a weight on the frozen one (BitDelta, Liu et al., arXiv 2402.10193).

    Delta = W' - W        theta = W + s sign(Delta)        s = mean |Delta|, of one tensor

This s has the smallest squared error for these signs. Matrices and convolutions become bits; other parameters
and buffers that changed (biases, gains, running statistics) are few, and kept as they are. Knows no files.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from selfmask_dist.backbones import fingerprint
from selfmask_dist.maskfile.mask import Mask, MaskFileError


@torch.no_grad()
def delta_mask(frozen: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> Mask:
    """Return the mask of kind `delta` that brings a frozen network near to its fine-tuned copy.

    Args:
        frozen, tuned: parameters and buffers by name, of the same names and shapes.

    Raises:
        MaskFileError: they are of two networks, hold what is not finite, or nothing of a matrix changed.
    """
    if odd := sorted(
        name for name in frozen.keys() | tuned.keys() if _shape(frozen, name) != _shape(tuned, name)
    ):
        raise MaskFileError(
            f"the fine-tuned network is another one: {', '.join(odd[:5])} are in one alone, or of other "
            "shapes"
        )
    signs: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    for name, weight in frozen.items():
        target = tuned[name].to(weight.device)
        if torch.equal(target, weight):
            continue
        if not weight.is_floating_point() or weight.ndim < 2:
            rest[name] = target.detach().clone().cpu()
            continue
        delta = target.double() - weight.double()
        if not delta.isfinite().all():
            raise MaskFileError(f"{name} is not finite in one of the two networks")
        signs[name] = (delta < 0).cpu()
        scales[name] = delta.abs().mean().cpu().reshape(1, 1)
    if not signs:
        raise MaskFileError("no matrix differs between the two networks: there is nothing to make bits of")
    return Mask(
        bits={name: torch.ones_like(sign) for name, sign in signs.items()},
        weights_fingerprint=fingerprint((name, frozen[name]) for name in sorted(signs)),
        scaled=False,
        kind="delta",
        signs=signs,
        scales=scales,
        statistics=rest,
    )


def _shape(tensors: Mapping[str, Tensor], name: str) -> torch.Size | None:
    return tensors[name].shape if name in tensors else None


def halve_vectors(vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return biases and gains in float16, as they are written into a tensor of any precision.

    What float16 does not hold to a thousandth of its largest value stays: large running statistics, integers.
    """
    found = {}
    for name, value in vectors.items():
        small = value.half() if value.dtype == torch.float32 else value
        worst = (small.double() - value.double()).abs().max() if value.numel() else value.new_zeros(())
        is_near = bool(worst <= 1e-3 * value.double().abs().max()) if value.numel() else False
        found[name] = small if is_near else value
    return found
