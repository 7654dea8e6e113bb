"""SLIP: CLIP on one view of an image and its caption, and SimCLR on two others, in one step.

    loss = CLIP(first view, caption) + weight SimCLR(second view, third view)

The first view is cropped alone, the other two are distorted as well. SimCLR has a projector of its own, three
linear layers with normalisation over the global batch. Here it starts from the encoder's output; the authors
take it before CLIP's projection, which is part of open_clip's image tower.

Source: Mu et al., arXiv 2112.12750, algorithm 1. Knows neither masks, optimizers nor process groups: the sum
over ranks is passed in.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selfmask_dist.backbones import Backbone, TextParts
from selfmask_dist.common.seeding import named_generator
from selfmask_dist.config import Config
from selfmask_dist.config.objectives import ClipConfig, SlipConfig
from selfmask_dist.data import Batch
from selfmask_dist.objectives.base import Context
from selfmask_dist.objectives.clip import Clip, text_of
from selfmask_dist.objectives.parts import Mlp, at_least_float32, encode_views
from selfmask_dist.objectives.simclr import nt_xent


def build(config: Config, backbone: Backbone, classes: tuple[str, ...], context: Context) -> "Slip":
    """Return SLIP with a backbone's own text tower; class names are not looked at.

    Raises:
        ValueError: the backbone has no text tower.
    """
    parts, scale = text_of(backbone, "slip")
    return Slip(
        backbone.spec.dim, parts, scale, config.slip, context, text_config=config.clip, seed=config.seed
    )


class Slip(Clip):
    """See the module's docstring; metrics of `Clip`, with `clip` and `simclr`, the two parts of the loss."""

    def __init__(
        self,
        in_dim: int,
        parts: TextParts,
        scale: float,
        config: SlipConfig,
        context: Context,
        *,
        text_config: ClipConfig,
        seed: int = 0,
    ) -> None:
        super().__init__(parts, scale, text_config, context)
        self.config = config
        generator = named_generator(seed, "slip projector")
        widths = (in_dim, config.hidden, config.hidden, config.dim)
        self.projector = Mlp(widths, generator, context=context, normalise_last=False)

    def forward(self, encoder: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """As `Objective.forward`; rows of weight 0 have no influence. Collective: every rank must call."""
        assert len(batch.views) == 3, len(batch.views)
        rows = len(batch.weights)
        features = encode_views(encoder, batch.views)
        clip, metrics = self.match(features[:rows], replace(batch, views=batch.views[:1]))
        with torch.autocast(features.device.type, enabled=False):
            pairs = at_least_float32(features[rows:]).view(2, rows, -1)
            embeddings = F.normalize(self.projector(pairs, batch.weights), dim=2)
            losses, _ = nt_xent(embeddings, batch.weights, self.context, self.config.temperature)
            share = batch.weights.to(losses.dtype) / batch.global_count
            simclr = (losses.mean(0) * share).sum()
        loss = clip + self.config.weight * simclr
        parts = {"clip": clip.detach(), "simclr": simclr.detach()}
        return loss, metrics | parts | {"loss": loss.detach()}

    def remarks(self, values: Mapping[str, float]) -> list[str]:
        return super().remarks(dict(values) | {"loss": values["clip"]})
