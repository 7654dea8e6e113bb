"""MoCo v2: one view finds the teacher's embedding of the other view among a queue of older keys; no labels.

With q = unit(g(encoder(view 1))) and, from the teacher, k = unit(g'(encoder'(view 2))),

    loss = mean_i - log exp(q_i . k_i / T) / (exp(q_i . k_i / T) + sum_{n in queue} exp(q_i . n / T))

The teacher (encoder' and g') is a moving average of encoder and projector; under masks it is the average of
scores. After the loss, the keys of the whole global batch enter the queue and the oldest ones leave; every
rank holds all of it. It starts with random unit vectors, as the authors' does. The projector g is two linear
layers with a ReLU between them; it is thrown away.

Keys are not shuffled between processes, as the authors do against a leak through batch statistics of each
process: with backbone.batchnorm=sync or frozen, or a network without batch normalisation, there is none.

Source: He et al., arXiv 1911.05722, algorithm 1; Chen et al., arXiv 2003.04297. Knows neither masks,
optimizers nor process groups; the teacher is given.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selfmask_dist.backbones import Backbone
from selfmask_dist.common.seeding import named_generator
from selfmask_dist.config import Config
from selfmask_dist.config.objectives import MocoV2Config
from selfmask_dist.data import Batch
from selfmask_dist.objectives.base import Context, Objective
from selfmask_dist.objectives.parts import Mlp, Watch, at_least_float32, mean_length


def build(config: Config, backbone: Backbone, classes: tuple[str, ...], context: Context) -> "MocoV2":
    """Return MoCo v2 on a backbone's features; class names are not looked at."""
    return MocoV2(backbone.spec.dim, config.moco_v2, context, seed=config.seed)


class MocoV2(Objective):
    """See the module's docstring; metrics `loss`, `agreement` (share of queries whose nearest key is of the
    same image) and `concentration` (length of the mean key).
    """

    queue: Tensor

    def __init__(self, in_dim: int, config: MocoV2Config, context: Context, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.context = context
        generator = named_generator(seed, "moco v2 projector and queue")
        self.projector = Mlp((in_dim, config.hidden, config.dim), generator)
        first = torch.randn(config.queue_length, config.dim, generator=generator)
        self.register_buffer("queue", F.normalize(first, dim=1))
        self._watch = Watch(
            "MoCo v2",
            trivial=math.log(1 + config.queue_length),
            advice="Lower optim.score_lr, or lengthen moco_v2.queue_length",
        )

    def start_step(self, step: int) -> None:
        self.teacher.momentum = self.config.momentum

    def forward(self, encoder: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """As `Objective.forward`; rows of weight 0 have no influence. Collective: every rank must call."""
        assert len(batch.views) == 2, len(batch.views)
        with torch.no_grad(), self.teacher():
            keys = self._embed(encoder(batch.views[1]), batch.weights)
        queries = self._embed(encoder(batch.views[0]), batch.weights)
        with torch.autocast(queries.device.type, enabled=False):
            queue = self.queue.to(queries.dtype, copy=True)  # which `_push` changes before backward
            similarity = torch.cat([(queries * keys).sum(1, keepdim=True), queries @ queue.T], dim=1)
            # a key that broke left an empty place
            is_empty = torch.cat([queue.new_zeros(1), (~queue.any(dim=1)).to(queue)]) > 0
            logits = (similarity / self.config.temperature).masked_fill(is_empty, -torch.inf)
            losses = F.cross_entropy(logits, torch.zeros_like(batch.ids), reduction="none")
            concentration = mean_length(keys, batch.weights, self.context)
            self._push(keys, batch)
        share = batch.weights.to(losses.dtype) / batch.global_count
        loss = (losses * share).sum()
        return loss, {
            "loss": loss.detach(),
            "agreement": ((logits.argmax(1) == 0).to(share) * share).sum(),
            "concentration": concentration * share.sum(),
        }

    def _embed(self, features: Tensor, weights: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            return F.normalize(self.projector(at_least_float32(features)[None], weights)[0], dim=1)

    @torch.no_grad()
    def _push(self, keys: Tensor, batch: Batch) -> None:
        """Put the global batch's keys in front of the older ones. A ragged last batch is left out: its
        padding depends on the number of ranks. Collective: every rank must call.
        """
        if batch.global_count < self.context.global_batch_size:
            return
        rows = self.context.gather(keys * batch.weights[:, None].to(keys))
        self.queue.copy_(torch.cat([rows.to(self.queue), self.queue])[: len(self.queue)])

    def head_parameters(self) -> list[nn.Parameter]:
        return list(self.projector.parameters())

    def teacher_parameters(self) -> list[nn.Parameter]:
        return list(self.projector.parameters())

    def remarks(self, values: Mapping[str, float]) -> list[str]:
        return self._watch(values)
