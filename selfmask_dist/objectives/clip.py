"""CLIP: images find their captions in the global batch, and captions their images.

With u = unit(encoder(image)), v = unit(text(caption)) and CLIP's factor t,

    loss = (mean_i - log softmax_j(t u_i . v_j)[i]  +  mean_i - log softmax_j(t v_i . u_j)[i]) / 2

The text tower is open_clip's, beside the backbone's image tower. Frozen, with t as pretrained, it is a fixed
space of meanings that masks move the images in; trained, it is a head (optim.head_lr) and t with it, at most
100 as in the paper. Every rank gathers all u and v, gradients included, so the sum over ranks is the loss of
one process and so are its gradients.

Source: Radford et al., arXiv 2103.00020, figure 3. Knows neither masks, optimizers nor process groups: the
sum over ranks is passed in.
"""

import copy
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selfmask_dist.backbones import Backbone, TextParts
from selfmask_dist.config import Config
from selfmask_dist.config.objectives import ClipConfig
from selfmask_dist.data import Batch
from selfmask_dist.objectives.base import Context, Objective
from selfmask_dist.objectives.parts import Watch, at_least_float32, mean_length

_LARGEST_SCALE = 100.0


def build(config: Config, backbone: Backbone, classes: tuple[str, ...], context: Context) -> "Clip":
    """Return CLIP with a backbone's own text tower; class names are not looked at, and nothing is drawn.

    Raises:
        ValueError: the backbone has no text tower.
    """
    parts, scale = text_of(backbone, "clip")
    return Clip(parts, scale, config.clip, context)


def text_of(backbone: Backbone, objective: str) -> tuple[TextParts, float]:
    """Return a backbone's text tower and scale, or raise a ValueError where it has none."""
    if backbone.text is None or backbone.logit_scale is None:
        raise ValueError(
            f"objective.name={objective} needs a text tower with its weights, which {backbone.spec.name} was "
            "loaded without; use an open_clip backbone with a pretrained tag or a whole CLIP model's file"
        )
    return backbone.text, backbone.logit_scale


class Clip(Objective):
    """See the module's docstring; metrics `loss`, `agreement` (share of images whose nearest caption is
    theirs) and `concentration` (length of the mean unit embedding of images).

    Args:
        parts: the text tower, of which a copy is made.
        scale: t.
    """

    def __init__(self, parts: TextParts, scale: float, config: ClipConfig, context: Context) -> None:
        super().__init__()
        self.context = context
        self.text = copy.deepcopy(parts.module).float().eval()
        self.tokenize: Callable[[list[str]], Tensor] = parts.tokenize
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.is_trained = config.text == "trained"
        self.requires_grad_(self.is_trained)
        for name, parameter in self.text.named_parameters():
            if name.rpartition(".")[2] in ("logit_scale", "logit_bias"):  # the copied model's own
                parameter.requires_grad_(False)
        self._watch = Watch(
            "CLIP",
            trivial=math.log(max(context.global_batch_size, 2)),
            advice="Lower optim.score_lr, or raise train.global_batch_size",
        )

    def train(self, mode: bool = True) -> "Clip":
        super().train(mode)
        self.text.eval()  # dropout in it would draw from the global generator
        return self

    def forward(self, encoder: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """As `Objective.forward`; rows of weight 0 have no influence. Collective: every rank must call."""
        assert len(batch.views) == 1, len(batch.views)
        return self.match(encoder(batch.views[0]), batch)

    def match(self, features: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of features (rows, dim) against the batch's captions, and metrics. Collective."""
        assert len(batch.captions) == len(features), (len(batch.captions), len(features))
        tokens = self.tokenize(list(batch.captions)).to(features.device)
        with torch.set_grad_enabled(self.is_trained and torch.is_grad_enabled()):
            texts = self.text(tokens)
        with torch.autocast(features.device.type, enabled=False):
            images = F.normalize(at_least_float32(features), dim=1)
            texts = F.normalize(texts.to(images.dtype), dim=1)
            scale = self.log_scale.to(images.dtype).clamp(max=math.log(_LARGEST_SCALE)).exp()
            is_real = self.context.gather(batch.weights.float()) > 0
            to_text, hits = self._find(images, self.context.gather(texts), is_real, scale)
            to_image, _ = self._find(texts, self.context.gather(images), is_real, scale)
            losses = (to_text + to_image) / 2
            concentration = mean_length(images, batch.weights, self.context)
        share = batch.weights.to(losses.dtype) / batch.global_count
        loss = (losses * share).sum()
        return loss, {
            "loss": loss.detach(),
            "agreement": (hits * share).sum(),
            "concentration": concentration * share.sum(),
        }

    def _find(self, rows: Tensor, columns: Tensor, is_real: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy of this rank's rows against all columns, and which found their own."""
        own = self.context.own_columns(len(rows), rows.device)
        logits = scale * rows @ columns.T
        is_own = torch.arange(len(columns), device=rows.device) == own[:, None]
        logits = logits.masked_fill(~is_real & ~is_own, -torch.inf)
        return F.cross_entropy(logits, own, reduction="none"), (logits.argmax(1) == own).to(rows.dtype)

    def head_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def kept_state(self) -> dict[str, Tensor]:
        """Return the text tower that images were matched with, where it was trained."""
        if not self.is_trained:
            return {}
        return {f"text.{name}": tensor for name, tensor in self.text.state_dict().items()} | {
            "log_scale": self.log_scale
        }

    def remarks(self, values: Mapping[str, float]) -> list[str]:
        return self._watch(values)
