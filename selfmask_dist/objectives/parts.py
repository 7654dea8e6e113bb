"""What several objectives are made of: views through an encoder, projectors, and the watch for a collapse.

Knows neither optimizers nor process groups.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selfmask_dist.objectives.base import Context

_COLLAPSED = 0.999  # length of the mean unit embedding
_FLAT = 0.002  # a loss that stays as near, as a share, to that of an encoder that tells nothing apart ...
_FLAT_LOGS = 3  # ... for so many logged means


def encode_views(encoder: nn.Module, views: Sequence[Tensor]) -> Tensor:
    """Return features (views * rows, dim), view after view, by one forward for each resolution.

    An encoder that `takes_several`, as sharded engines make it, gets all resolutions in one call, as a list.
    """
    groups: list[Tensor] = []
    start = 0
    for end in range(1, len(views) + 1):
        if end == len(views) or views[end].shape[-2:] != views[start].shape[-2:]:
            groups.append(torch.cat(list(views[start:end])))
            start = end
    if len(groups) > 1 and getattr(encoder, "takes_several", False):
        return torch.cat(encoder(groups))
    return torch.cat([encoder(group) for group in groups])


def at_least_float32(features: Tensor) -> Tensor:
    """Return features in float32 or float64.

    bf16 keeps 8 bits of a similarity, which is then divided by a temperature of 0.1 or less.
    """
    return features if features.dtype == torch.float64 else features.float()


def linear(in_dim: int, out_dim: int, generator: torch.Generator, *, bias: bool = True) -> nn.Linear:
    """Return a linear layer with torch's own first weights, drawn from `generator` and not the global one."""
    layer = nn.Linear(in_dim, out_dim, bias=bias, device="meta").to_empty(device="cpu")
    bound = 1 / math.sqrt(in_dim)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-bound, bound, generator=generator)
    return layer


class Mlp(nn.Module):
    """Linear layers with ReLU or GELU between them, (views, rows, dim) -> (views, rows, out).

    Args:
        widths: in, hidden ..., out.
        context: normalise by the global batch after every linear layer (before the nonlinearity; the last one
            without gain and bias), as MoCo v3 has it; None: no normalisation.
    """

    def __init__(
        self,
        widths: Sequence[int],
        generator: torch.Generator,
        *,
        context: Context | None = None,
        normalise_last: bool = True,
        is_smooth: bool = False,
    ) -> None:
        super().__init__()
        last = len(widths) - 2
        self.layers = nn.ModuleList(
            linear(widths[i], widths[i + 1], generator, bias=context is None) for i in range(last + 1)
        )
        self.norms = nn.ModuleList()
        if context is not None:
            self.norms.extend(GlobalBatchNorm(width, context) for width in widths[1:-1])
            if normalise_last:
                self.norms.append(GlobalBatchNorm(widths[-1], context, affine=False))
        self.is_smooth = is_smooth

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """Return the output; `weights` (rows,) are 0 for rows that do not count in the normalisation."""
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index < len(self.norms):
                x = self.norms[index](x, weights)
            if index + 1 < len(self.layers):
                x = F.gelu(x) if self.is_smooth else x.relu()
        return x


class GlobalBatchNorm(nn.Module):
    """Batch normalisation over the rows of all ranks, view by view, so it does not depend on how a batch is
    dealt. It has no running statistics: heads are thrown away after training.
    """

    def __init__(self, dim: int, context: Context, *, affine: bool = True, eps: float = 1e-5) -> None:
        super().__init__()
        self.context = context
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if affine else None

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """Return x (views, rows, dim), normalised over the rows of weight 1. Collective: all ranks call."""
        rows = weights.to(x.dtype)
        sums = torch.cat([torch.einsum("vbd,b->vd", x, rows).flatten(), rows.sum()[None]])
        total = self.context.all_reduce_with_gradient(sums)
        count = total[-1].detach().clamp(min=1)
        x = x - (total[:-1] / count).view(len(x), 1, -1)
        # of centred values: the mean of squares minus a square would lose digits
        squares = torch.einsum("vbd,b->vd", x.square(), rows)
        var = self.context.all_reduce_with_gradient(squares) / count
        x = x * (var[:, None] + self.eps).rsqrt()
        return x if self.weight is None or self.bias is None else x * self.weight + self.bias


class Watch:
    """Says once when a contrastive loss tells nothing, or embeddings collapsed.

    Args:
        name: of the objective, as it is written.
        trivial: the loss where every image looks the same.
        advice: what to change then.
    """

    def __init__(self, name: str, *, trivial: float, advice: str) -> None:
        self._name, self._trivial, self._advice = name, trivial, advice
        self._flat_logs = 0
        self._told: set[str] = set()

    def __call__(self, values: Mapping[str, float]) -> list[str]:
        found: dict[str, str] = {}
        loss, trivial = values["loss"], self._trivial
        self._flat_logs = self._flat_logs + 1 if abs(loss - trivial) < _FLAT * trivial else 0
        if self._flat_logs == _FLAT_LOGS:
            found["flat"] = (
                f"{self._name} learns nothing: the loss stays at {loss:.3f}, as if every image were as "
                f"near to all others. {self._advice}"
            )
        if (length := values["concentration"]) > _COLLAPSED:
            found["collapse"] = (
                f"{self._name} collapsed: all embeddings point one way (mean length {length:.4f}, loss "
                f"{loss:.3f}). {self._advice}"
            )
        new = [text for key, text in found.items() if key not in self._told]
        self._told |= set(found)
        return new


def mean_length(embeddings: Tensor, weights: Tensor, context: Context) -> Tensor:
    """Return the length of the mean unit embedding (rows, dim) of the global batch: 1 where all are alike.

    Collective: every rank must call.
    """
    rows = weights.to(embeddings.dtype)
    sums = torch.cat([(rows[:, None] * embeddings.detach()).sum(0), rows.sum()[None]])
    total = context.all_reduce(sums)
    return total[:-1].norm() / total[-1].clamp(min=1)


def ramp(start: float, step: int, num_steps: int) -> float:
    """Return a teacher's momentum at a step: it rises from `start` to 1 along half a cosine.

    Source: BYOL, arXiv 2006.07733, section 3.
    """
    progress = min(step / max(num_steps, 1), 1.0)
    return 1 - (1 - start) * (math.cos(math.pi * progress) + 1) / 2
