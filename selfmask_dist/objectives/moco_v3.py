"""MoCo v3: each view predicts the teacher's embedding of the other view, among all images of the global
batch.

With q = unit(p(g(encoder(view)))) and, from the teacher, k = unit(g'(encoder'(view))), for views 1 and 2,

    ctr(q, k) = 2 T mean_i - log exp(q_i . k_i / T) / sum_j exp(q_i . k_j / T)
    loss = ctr(q_1, k_2) + ctr(q_2, k_1)

The teacher (encoder' and g') is a moving average of encoder and projector g with a momentum that rises to 1;
under masks it is the average of scores. Keys get no gradient; they are gathered over ranks, and normalisation
inside g and p is over the global batch, so the loss does not depend on how it is dealt. g has three linear
layers and p two; both are thrown away.

Source: Chen, Xie, He, arXiv 2104.02057, algorithm 1 and section 4. Knows neither masks, optimizers nor
process groups; the teacher is given.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selfmask_dist.backbones import Backbone
from selfmask_dist.common.seeding import named_generator
from selfmask_dist.config import Config
from selfmask_dist.config.objectives import MocoV3Config
from selfmask_dist.data import Batch
from selfmask_dist.objectives.base import Context, Objective
from selfmask_dist.objectives.parts import (
    Mlp,
    Watch,
    at_least_float32,
    encode_views,
    mean_length,
    ramp,
)


def build(config: Config, backbone: Backbone, classes: tuple[str, ...], context: Context) -> "MocoV3":
    """Return MoCo v3 on a backbone's features; class names are not looked at."""
    return MocoV3(backbone.spec.dim, config.moco_v3, context, seed=config.seed)


class MocoV3(Objective):
    """See the module's docstring; metrics `loss`, `agreement` (share of views whose nearest key is of the
    same image) and `concentration` (length of the mean key).
    """

    def __init__(self, in_dim: int, config: MocoV3Config, context: Context, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.context = context
        generator = named_generator(seed, "moco v3 projector and predictor")
        hidden, dim = config.hidden, config.dim
        self.projector = Mlp((in_dim, hidden, hidden, dim), generator, context=context)
        self.predictor = Mlp((dim, hidden, dim), generator, context=context)
        self._watch = Watch(
            "MoCo v3",
            trivial=4 * config.temperature * math.log(max(context.global_batch_size, 2)),
            advice="Lower optim.score_lr, or raise train.global_batch_size",
        )

    def start_step(self, step: int) -> None:
        self.teacher.momentum = ramp(self.config.momentum, step, self.context.num_steps)

    def forward(self, encoder: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """As `Objective.forward`; rows of weight 0 have no influence. Collective: every rank must call."""
        assert len(batch.views) == 2, len(batch.views)
        with torch.no_grad(), self.teacher():
            keys = self._project(encode_views(encoder, batch.views), batch.weights)
        features = encode_views(encoder, batch.views)
        with torch.autocast(features.device.type, enabled=False):
            projected = self._project(features, batch.weights, is_unit=False)
            queries = F.normalize(self.predictor(projected, batch.weights), dim=2)
            pairs = [self._contrast(queries[v], keys[1 - v], batch.weights) for v in range(2)]
            concentration = mean_length(keys[0], batch.weights, self.context)
        losses, hits = (torch.stack(parts).sum(0) for parts in zip(*pairs, strict=True))
        share = batch.weights.to(losses.dtype) / batch.global_count
        loss = (losses * share).sum()
        return loss, {
            "loss": loss.detach(),
            "agreement": (hits * share).sum() / 2,
            "concentration": concentration * share.sum(),
        }

    def _project(self, features: Tensor, weights: Tensor, *, is_unit: bool = True) -> Tensor:
        """Return the projected features: (2 * rows, dim) -> (2, rows, dim)."""
        with torch.autocast(features.device.type, enabled=False):
            projected = self.projector(at_least_float32(features).view(2, len(weights), -1), weights)
            return F.normalize(projected, dim=2) if is_unit else projected

    def _contrast(self, queries: Tensor, keys: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return 2 T times the cross-entropy of queries (rows, dim) to all keys, and hits: (rows,) each."""
        everyone, is_real = self.context.gather(keys), self.context.gather(weights.float()) > 0
        own = self.context.own_columns(len(queries), queries.device)
        logits = queries @ everyone.T / self.config.temperature
        is_own = torch.arange(len(everyone), device=queries.device) == own[:, None]
        logits = logits.masked_fill(~is_real & ~is_own, -torch.inf)
        losses = 2 * self.config.temperature * F.cross_entropy(logits, own, reduction="none")
        return losses, (logits.argmax(1) == own).to(losses.dtype)

    def head_parameters(self) -> list[nn.Parameter]:
        return [*self.projector.parameters(), *self.predictor.parameters()]

    def teacher_parameters(self) -> list[nn.Parameter]:
        return list(self.projector.parameters())

    def remarks(self, values: Mapping[str, float]) -> list[str]:
        return self._watch(values)
