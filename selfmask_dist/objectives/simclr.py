"""SimCLR: two views of one image find each other among all other views of the global batch; no labels.

With z = unit(g(encoder(view))) for the 2 N views of a global batch of N images, and i' the other view of i,

    loss = mean_i - log exp(z_i . z_i' / temperature) / sum_{k != i} exp(z_i . z_k / temperature)

(NT-Xent). Every rank gathers all z, gradients included, and sums over its own i, so the sum over ranks is the
loss of one process and so are its gradients. The projector g is two linear layers with a ReLU between them,
as in the paper's equation; it is thrown away.

Source: Chen et al., arXiv 2002.05709, equation 1 and algorithm 1. Knows neither masks, optimizers nor process
groups: the sum over ranks is passed in.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selfmask_dist.backbones import Backbone
from selfmask_dist.common.seeding import named_generator
from selfmask_dist.config import Config
from selfmask_dist.config.objectives import SimclrConfig
from selfmask_dist.data import Batch
from selfmask_dist.objectives.base import Context, Objective
from selfmask_dist.objectives.parts import Mlp, Watch, at_least_float32, encode_views, mean_length


def build(config: Config, backbone: Backbone, classes: tuple[str, ...], context: Context) -> "Simclr":
    """Return SimCLR on a backbone's features; class names are not looked at."""
    return Simclr(backbone.spec.dim, config.simclr, context, seed=config.seed)


class Simclr(Objective):
    """See the module's docstring; metrics `loss`, `agreement` (share of views whose nearest other view is of
    the same image) and `concentration` (length of the mean unit embedding).
    """

    def __init__(self, in_dim: int, config: SimclrConfig, context: Context, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.context = context
        generator = named_generator(seed, "simclr projector")
        self.projector = Mlp((in_dim, config.hidden, config.dim), generator)
        self._watch = Watch(
            "SimCLR",
            trivial=math.log(max(2 * context.global_batch_size - 1, 2)),
            advice="Lower optim.score_lr, or raise train.global_batch_size",
        )

    def forward(self, encoder: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """As `Objective.forward`; rows of weight 0 have no influence. Collective: every rank must call."""
        assert len(batch.views) == 2, len(batch.views)
        features = encode_views(encoder, batch.views)
        with torch.autocast(features.device.type, enabled=False):
            features = at_least_float32(features).view(2, len(batch.weights), -1)
            embeddings = F.normalize(self.projector(features, batch.weights), dim=2)
            losses, hits = nt_xent(embeddings, batch.weights, self.context, self.config.temperature)
            concentration = mean_length(embeddings[0], batch.weights, self.context)
        share = batch.weights.to(losses.dtype) / batch.global_count
        loss = (losses.mean(0) * share).sum()
        return loss, {
            "loss": loss.detach(),
            "agreement": (hits.mean(0) * share).sum(),
            "concentration": concentration * share.sum(),
        }

    def head_parameters(self) -> list[nn.Parameter]:
        return list(self.projector.parameters())

    def remarks(self, values: Mapping[str, float]) -> list[str]:
        return self._watch(values)


def nt_xent(
    embeddings: Tensor, weights: Tensor, context: Context, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return NT-Xent of this rank's rows against the global batch, and whether each found its other view.

    Args:
        embeddings: (2, rows, dim), unit.
        weights: (rows,), 0 for rows that are nobody's negative.

    Returns:
        losses, hits: (2, rows) each. Collective: every rank must call.
    """
    num_rows, device = embeddings.shape[1], embeddings.device
    everyone = context.gather(embeddings.transpose(0, 1).contiguous()).transpose(0, 1).flatten(0, 1)
    is_real = (context.gather(weights.float()) > 0).repeat(2)
    count = len(everyone) // 2
    own = context.own_columns(num_rows, device)
    place = torch.cat([own, own + count])  # of each local view among all
    other = torch.cat([own + count, own])
    logits = embeddings.flatten(0, 1) @ everyone.T / temperature
    columns = torch.arange(2 * count, device=device)
    is_other = columns == other[:, None]
    # the other view stays for rows that do not count as well: a row without any would give NaN times 0
    excluded = (columns == place[:, None]) | (~is_real & ~is_other)
    logits = logits.masked_fill(excluded, -torch.inf)
    losses = F.cross_entropy(logits, other, reduction="none")
    hits = (logits.argmax(1) == other).to(losses.dtype)
    return losses.view(2, num_rows), hits.view(2, num_rows)
