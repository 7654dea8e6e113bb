"""Masks as a parametrisation: scores are the module's parameters and theta is made anew in every forward.

    theta = a * W * M        dL/dS = a * G * W - <G, theta> / (2 * sum M)        (see `core`)

For optimizers that own their parameters and lay them out as they like (DeepSpeed ZeRO): what they train must
be a parameter of the module. `attach` is cheaper wherever it can be used. The module must hold whole scores
and weights while it runs. Knows nothing of files, process groups or kinds of optimizers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from selfmask_dist.masking import checks, core
from selfmask_dist.masking.reading import MaskSet
from selfmask_dist.masking.shards import Shards


class ScaledMask(nn.Module):
    """Scores -> theta for one parameter; holds its frozen weight."""

    def __init__(self, weight: Tensor, *, threshold: float, scale: core.Scale, num_segments: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.threshold = threshold
        self.scale = scale
        self.num_segments = num_segments

    def forward(self, scores: Tensor) -> Tensor:
        theta: Tensor = _Theta.apply(scores, self.weight, self.threshold, self.scale, self.num_segments)
        return theta


class _Theta(torch.autograd.Function):
    """Formula (*) of `core`, with G and theta of the whole tensor at hand."""

    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, weight: Tensor, threshold: float, scale: core.Scale, num_segments: int
    ) -> Tensor:
        theta = torch.empty_like(weight)
        num_kept, scales = [], []
        pieces = (tensor.chunk(num_segments) for tensor in (scores, theta, weight))
        for scores_piece, theta_piece, weight_piece in zip(*pieces, strict=True):
            kept = core.write_mask(scores_piece, threshold, out=theta_piece)
            factor = core.scale_factor(kept, theta_piece.numel(), theta.dtype)
            core.finish_theta(theta_piece, weight_piece, None if scale == "none" else factor)
            num_kept.append(kept)
            scales.append(factor)
        # the weight itself, not theta: under ZeRO-3 it is given back after forward and gathered for backward
        ctx.save_for_backward(weight, theta if scale == "through" else None)
        ctx.constants = (num_kept, scales, scale, scores.dtype)
        return theta

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        weight, theta = ctx.saved_tensors
        num_kept, scales, scale, dtype = ctx.constants
        out = torch.empty_like(weight, dtype=dtype)
        parts = len(scales)
        thetas = theta.chunk(parts) if theta is not None else [None] * parts
        pieces = zip(
            grad.chunk(parts), weight.chunk(parts), out.chunk(parts), thetas, scales, num_kept, strict=True
        )
        for grad_piece, weight_piece, out_piece, theta_piece, factor, kept in pieces:
            core.pullback(
                grad_piece,
                weight_piece,
                scale=None if scale == "none" else factor,
                grad_dot_theta=None if theta_piece is None else core.inner_product(grad_piece, theta_piece),
                num_kept=kept,
                out=out_piece,
            )
        return out, None, None, None, None


class ReadShards(Shards):
    """Every tensor is wherever its optimizer keeps it; `read` gives its whole value."""

    def __init__(self, read: Callable[[nn.Parameter], Tensor]) -> None:
        self._read = read

    def piece(self, name: str, tensor: Tensor) -> Tensor:
        return self.whole(name, tensor)

    def whole(self, name: str, tensor: Tensor) -> Tensor:
        return self._read(tensor) if isinstance(tensor, nn.Parameter) else tensor

    def whole_weight(self, name: str, weight: Tensor) -> Tensor:
        return self.whole(name, weight)


@dataclass
class ParametrizedEntry:
    """One parameter under a mask, with the names that `MaskedParameter` gives its parts."""

    name: str
    scores: nn.Parameter
    weight: nn.Parameter
    shape: torch.Size
    num_segments: int
    shards: Shards

    @property
    def theta(self) -> Tensor:
        """A stand-in of theta's shape; theta itself exists only inside a forward."""
        return torch.empty(self.shape, device="meta")

    def piece(self, tensor: Tensor) -> Tensor:
        return self.shards.piece(self.name, tensor)


class ParametrizedMasks(MaskSet[ParametrizedEntry]):
    """The masks on one model. Made by `parametrized_attach`."""

    def bind(self, optimizer: Optimizer) -> None:
        """Nothing to do: theta follows from the scores in every forward."""

    def pull_back(self, dots: Tensor | None = None) -> None:
        """Nothing to do: autograd does it."""

    def rewrite(self) -> None:
        """Nothing to do: theta follows from the scores in every forward."""

    def summary(self) -> str:
        masked = sum(entry.shape.numel() for entry in self.entries)
        return f"masked   {len(self.entries):4d} parameters, {masked:,} weights (parametrised)"


def parametrized_attach(
    model: nn.Module,
    *,
    include: str | Sequence[str] = "auto",
    exclude: str | Sequence[str] = (),
    threshold: float = 0.0,
    init: float | Mapping[str, Tensor] = 1.0,
    scale: core.Scale = "through",
    split_qkv: bool = False,
    allow_norm: bool = False,
    read: Callable[[nn.Parameter], Tensor] = lambda parameter: parameter.detach(),
) -> ParametrizedMasks:
    """Put a learned mask on chosen parameters of `model`, in place; see `Masks.attach`.

    Args:
        read: gives a parameter's whole value, for optimizers that partition parameters.
    """
    names = checks.choose(
        model, include, exclude=exclude, allow_norm=allow_norm, init=init, threshold=threshold, scale=scale
    )
    model.requires_grad_(False)
    shards, entries = ReadShards(read), []
    for name in names:
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        weight = getattr(module, attribute).detach()
        num_segments = checks.num_segments(name, split_qkv=split_qkv)
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        start = init[name] if isinstance(init, Mapping) else torch.full((), init)
        scores = torch.empty(weight.shape, dtype=dtype, device=weight.device).copy_(start)
        mask = ScaledMask(weight, threshold=threshold, scale=scale, num_segments=num_segments)
        setattr(module, attribute, nn.Parameter(scores))
        parametrize.register_parametrization(module, attribute, mask, unsafe=True)
        trained = module.get_parameter(f"parametrizations.{attribute}.original")
        setattr(trained, checks.MARK, True)
        entries.append(ParametrizedEntry(name, trained, mask.weight, weight.shape, num_segments, shards))
    return ParametrizedMasks(model, entries, threshold=threshold, scale=scale, shards=shards)
