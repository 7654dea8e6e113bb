"""DINO: each crop predicts the teacher's distribution over outputs for the large crops; no labels.

With outputs s = C unit(g(encoder(crop))) over the unit rows of C, and t likewise from the teacher, for the
two large crops i and all other crops v,

    p_i = softmax((t_i - center) / T_teacher)                                    no gradient
    loss = mean_i mean_{v != i} - sum_k p_i[k] log softmax(s_v / T_student)[k]
    center <- m_c center + (1 - m_c) mean of t over the global batch              after the loss

Subtracting the center keeps one output from winning everywhere, and the teacher's low temperature
(sharpening) keeps outputs from being all alike; the two balance. The teacher is a moving average of encoder
and head with a momentum that rises to 1; under masks it is the average of scores. g has three linear layers
with GELU; C stays as it is for the first steps. The whole head is thrown away.

Source: Caron et al., arXiv 2104.14294, algorithm 1 and appendix C. Knows neither masks, optimizers nor
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
from selfmask_dist.config.objectives import DinoConfig
from selfmask_dist.data import Batch
from selfmask_dist.objectives.base import Context, Objective
from selfmask_dist.objectives.parts import Mlp, at_least_float32, encode_views, ramp

_LARGE = 2  # crops that the teacher sees
_ALIKE = 0.998  # entropy of an image's targets, as a share of the largest one
_ONE_OUTPUT = 0.02  # entropy of the mean of all targets, likewise


def build(config: Config, backbone: Backbone, classes: tuple[str, ...], context: Context) -> "Dino":
    """Return DINO on a backbone's features; class names are not looked at."""
    return Dino(backbone.spec.dim, config.dino, context, seed=config.seed)


class Dino(Objective):
    """See the module's docstring; metrics `loss`, `target_entropy` (of an image's targets, the mean over
    images) and `output_entropy` (of the mean over images), both as shares of the log of the number of
    outputs.
    """

    center: Tensor

    def __init__(self, in_dim: int, config: DinoConfig, context: Context, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.context = context
        generator = named_generator(seed, "dino head")
        widths = (in_dim, config.hidden, config.hidden, config.bottleneck)
        self.projector = Mlp(widths, generator, is_smooth=True)
        self.last = nn.Parameter(torch.randn(config.outputs, config.bottleneck, generator=generator))
        self.register_buffer("center", torch.zeros(config.outputs))
        self._step = 0
        self._told: set[str] = set()

    def start_step(self, step: int) -> None:
        self._step = step
        self.teacher.momentum = ramp(self.config.momentum, step, self.context.num_steps)

    @property
    def teacher_temperature(self) -> float:
        first, last = self.config.teacher_temperature
        warmup_steps = self.config.warmup_steps(self.context.steps_per_epoch)
        if self._step >= warmup_steps:
            return last
        return first + (last - first) * self._step / warmup_steps

    def forward(self, encoder: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """As `Objective.forward`; rows of weight 0 have no influence. Collective: every rank must call."""
        large = batch.views[:_LARGE]
        assert len(large) == _LARGE, len(batch.views)
        assert large[0].shape == large[1].shape, "the teacher sees two crops of the first resolution"
        num_rows = len(batch.weights)
        with torch.no_grad(), self.teacher():
            outputs = self._score(encode_views(encoder, large), num_rows)
            targets = ((outputs - self.center.to(outputs)) / self.teacher_temperature).softmax(dim=2)
            mean_target = self._move_center(outputs, targets, batch.weights)
        scores = self._score(encode_views(encoder, batch.views), num_rows)
        with torch.autocast(scores.device.type, enabled=False):
            log_probabilities = (scores / self.config.student_temperature).log_softmax(dim=2)
            # - sum_k p_i[k] log p_v[k] for every pair (i, v): (large, views, rows)
            losses = -torch.einsum("ibk,vbk->ivb", targets, log_probabilities)
            share = batch.weights.to(losses.dtype) / batch.global_count
            others = 1 - torch.eye(_LARGE, len(batch.views), dtype=losses.dtype, device=losses.device)
            loss = (losses @ share * others).sum() / others.sum()
        entropies = _entropy(targets).mean(0) / math.log(self.config.outputs)
        return loss, {
            "loss": loss.detach(),
            "target_entropy": (entropies * share).sum(),
            "output_entropy": _entropy(mean_target) / math.log(self.config.outputs) * share.sum(),
        }

    def _score(self, features: Tensor, num_rows: int) -> Tensor:
        """Return the head's outputs: (views * rows, dim) -> (views, rows, outputs)."""
        with torch.autocast(features.device.type, enabled=False):
            features = at_least_float32(features).view(-1, num_rows, features.shape[1])
            bottleneck = F.normalize(self.projector(features, features.new_ones(num_rows)), dim=2)
            return bottleneck @ F.normalize(self.last, dim=1).T

    def _move_center(self, outputs: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Move the center after this batch, and return the mean target (outputs,) of the global batch."""
        rows = weights.to(outputs.dtype)
        sums = [torch.einsum("vbk,b->k", tensor, rows) for tensor in (outputs, targets)]
        total = self.context.all_reduce(torch.cat([*sums, len(outputs) * rows.sum()[None]]))
        mean_output, mean_target = (total[:-1] / total[-1].clamp(min=1)).chunk(2)
        self.center.lerp_(mean_output.to(self.center), 1 - self.config.center_momentum)
        return mean_target

    def head_parameters(self) -> list[nn.Parameter]:
        return [*self.projector.parameters(), self.last]

    def teacher_parameters(self) -> list[nn.Parameter]:
        return self.head_parameters()

    def held_parameters(self) -> list[nn.Parameter]:
        is_frozen = self._step < self.config.freeze_steps(self.context.steps_per_epoch)
        return [self.last] if is_frozen else []

    def remarks(self, values: Mapping[str, float]) -> list[str]:
        """Return the news of both kinds of collapse, each once."""
        found: dict[str, str] = {}
        if values["target_entropy"] > _ALIKE:
            found["alike"] = (
                "DINO collapsed: the teacher's targets are the same for all outputs "
                f"({values['target_entropy']:.4f} of the largest entropy). Lower dino.teacher_temperature"
            )
        if values["output_entropy"] < _ONE_OUTPUT:
            found["one"] = (
                "DINO collapsed: all images have one output "
                f"({values['output_entropy']:.4f} of the largest entropy). Lower dino.center_momentum, raise "
                "dino.teacher_temperature, or lower optim.score_lr"
            )
        new = [text for key, text in found.items() if key not in self._told]
        self._told |= set(found)
        return new


def _entropy(probabilities: Tensor) -> Tensor:
    """Return the entropy of distributions: (..., outputs) -> (...), with 0 log 0 = 0."""
    return torch.special.entr(probabilities).sum(dim=-1)
