"""Cross-entropy against labels (paper 4.1), through one of three heads on the encoder's features x:

    linear     logits = W norm(x) + b      W, b trained
    masked     logits = W norm(x)          W frozen and random, for whoever attaches a mask to `head.weight`
    clip_text  logits = t * T x / |x|      T: text embeddings of the classes, t: CLIP's scale; nothing trained

With a teacher, a share w of the loss is T^2 KL(teacher | student) of both logits over T (Hinton, Vinyals,
Dean 2015, arXiv 1503.02531; movement pruning's w is 0.5, its T 2). Knows neither masks, optimizers nor
process groups.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selfmask_dist.backbones import Backbone
from selfmask_dist.common.seeding import named_generator
from selfmask_dist.config import Config
from selfmask_dist.config.objectives import ObjectiveConfig
from selfmask_dist.data import Batch
from selfmask_dist.objectives.base import Context, Objective
from selfmask_dist.objectives.parts import at_least_float32

# images (n, 3, H, W) -> logits (n, classes); it is not trained, and gradients do not enter it
LogitsFn = Callable[[Tensor], Tensor]

# The curvature of cross-entropy along the head is at most s^2 / 2 for features of length s, so SGD with
# momentum m is stable for lr < 4 (1 + m) / s^2: at s = 8 and m = 0.9 up to lr 0.12, whatever the dimension.
L2_LENGTH = 8.0


def build(
    config: Config,
    backbone: Backbone,
    classes: tuple[str, ...],
    context: Context,
    *,
    distill_teacher: LogitsFn | None = None,
) -> "Supervised":
    """Return the supervised objective for a backbone and its data set's classes.

    Raises:
        ValueError: `clip_text` with a backbone that has no text tower; and as `Supervised`.
    """
    section = config.objective
    text, scale = None, 1.0
    if section.head == "clip_text":
        if backbone.text_embeddings is None or backbone.logit_scale is None:
            raise ValueError(
                f"objective.head=clip_text needs a text tower with its weights, which {backbone.spec.name} "
                "was loaded without; use an open_clip backbone with a pretrained tag or a whole CLIP "
                "model's file, or head=linear"
            )
        text, scale = embed_classes(backbone, classes, section.prompts), backbone.logit_scale
    objective = Supervised(
        backbone.spec.dim,
        len(classes),
        section,
        text_embeddings=text,
        logit_scale=scale,
        distill_teacher=distill_teacher,
        seed=config.seed,
    )
    objective.classes = classes
    return objective


def embed_classes(backbone: Backbone, classes: Sequence[str], prompts: Sequence[str]) -> Tensor:
    """Return text embeddings (classes, dim): for each class the mean over its prompts, at unit length."""
    assert backbone.text_embeddings is not None
    names = [name.replace("_", " ") for name in classes]
    per_prompt = [
        backbone.text_embeddings([prompt.replace("{}", name) for name in names]) for prompt in prompts
    ]
    return F.normalize(torch.stack(per_prompt).mean(dim=0), dim=1)


class Supervised(Objective):
    """Cross-entropy with label smoothing, weighted by row; metrics `loss` and `accuracy`.

    Args:
        dim: length of the encoder's features.
        num_classes: 2 or more.
        config: the head, the norm before it ("l2" scales features to length `L2_LENGTH`, "batchnorm" is
            `FeatureBatchNorm`; `clip_text` has none), the smoothing, and a teacher's share and temperature.
        text_embeddings, logit_scale: T (num_classes, dim) and t, for `clip_text` alone.
        distill_teacher: whose logits are learned beside the labels; None: labels alone.
        seed: of the head's first weights; the global generators are left as they were.

    Raises:
        ValueError: fewer than 2 classes, or text embeddings of another shape.
    """

    text_embeddings: Tensor
    classes: tuple[str, ...] = ()  # their names, where `build` knew them
    fewest = 2  # classes that make a task
    length = L2_LENGTH  # of features under the norm l2

    def __init__(
        self,
        dim: int,
        num_classes: int,
        config: ObjectiveConfig,
        *,
        text_embeddings: Tensor | None = None,
        logit_scale: float = 1.0,
        distill_teacher: LogitsFn | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if num_classes < self.fewest:
            raise ValueError(
                f"supervised training needs {self.fewest} classes or more; the data has {num_classes}"
            )
        self.config = config
        self.num_classes = num_classes
        self.logit_scale = logit_scale
        self.distill_teacher = distill_teacher  # no module: it is neither trained nor saved
        self.head: nn.Linear | None = None
        self.norm: FeatureBatchNorm | None = None
        if config.head == "clip_text":
            shape = None if text_embeddings is None else tuple(text_embeddings.shape)
            if text_embeddings is None or shape != (num_classes, dim):
                raise ValueError(
                    f"head=clip_text needs text embeddings of shape ({num_classes}, {dim}); got {shape}"
                )
            # not part of the state: they follow from the frozen text tower and the class names
            self.register_buffer(
                "text_embeddings", text_embeddings.detach().float().clone(), persistent=False
            )
        else:
            self.head = _new_head(dim, num_classes, is_masked=config.head == "masked", seed=seed)
            self.norm = FeatureBatchNorm(dim) if config.head_norm == "batchnorm" else None

    def forward(self, encoder: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """As `Objective.forward`; rows of weight 0 have no influence, whatever their label. Of mixed pictures
        both labels count by their shares, and accuracy is that of the first.

        Raises:
            ValueError: a label of a real sample is outside 0 ... num_classes - 1. Checked where labels are on
                the CPU; on a GPU, where reading them would stop the device, cross-entropy's own assertion
                fails instead.
        """
        assert len(batch.views) == 1, len(batch.views)
        is_real = batch.weights > 0
        if batch.labels.device.type == "cpu":
            self._check_labels(batch, is_real)
        logits = self._classify(encoder(batch.views[0]), batch.weights)
        labels = batch.labels.where(is_real, 0)
        losses = self._label_losses(logits, labels)
        if batch.mixed is not None:  # cross-entropy is linear in the target
            others = self._label_losses(logits, batch.mixed.labels.where(is_real, 0))
            losses = batch.mixed.shares * losses + (1 - batch.mixed.shares) * others
        if self.distill_teacher is not None:
            with torch.no_grad():
                taught = self.distill_teacher(batch.views[0])
            share = self.config.distill_weight
            from_teacher = distillation_losses(logits, taught, self.config.distill_temperature)
            losses = (1 - share) * losses + share * from_teacher
        loss = (batch.weights * losses).sum() / batch.global_count
        is_correct = (logits.argmax(dim=1) == labels).to(losses.dtype)
        accuracy = (batch.weights * is_correct).sum() / batch.global_count
        return loss, {"loss": loss.detach(), "accuracy": accuracy}

    def _label_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        smoothing = self.config.label_smoothing
        return F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)

    def head_parameters(self) -> list[nn.Parameter]:
        return list(self.head.parameters()) if self.head is not None and self.config.head == "linear" else []

    def predict(self, encoder: nn.Module, images: Tensor) -> Tensor:
        return self._classify(encoder(images), None)

    def _classify(self, features: Tensor, weights: Tensor | None) -> Tensor:
        # float32 under autocast too: bf16 keeps 8 bits of a logit, and CLIP's are near 30
        with torch.autocast(features.device.type, enabled=False):
            features = at_least_float32(features)
            if self.head is None:
                text_embeddings = self.text_embeddings.to(features.dtype)
                return self.logit_scale * F.normalize(features, dim=1) @ text_embeddings.T
            if self.config.head_norm == "l2":
                features = F.normalize(features, dim=1) * self.length
            elif self.norm is not None:
                features = self.norm(features, weights)
            return self.head(features)

    def _check_labels(self, batch: Batch, is_real: Tensor) -> None:
        bad = is_real & ((batch.labels < 0) | (batch.labels >= self.num_classes))
        if bad.any():
            samples = [
                f"{i} (label {y})"
                for i, y in zip(batch.ids[bad].tolist(), batch.labels[bad].tolist(), strict=True)
            ]
            raise ValueError(
                f"supervised training needs labels 0 to {self.num_classes - 1} (-1 means none); "
                f"{len(samples)} samples of this batch have others: sample {', '.join(samples[:5])}. Add the "
                "labels to the shards, or leave these out"
            )


def distillation_losses(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T^2 KL(teacher | student) of logits (n, classes) over T, for each row: (n,)."""
    student = F.log_softmax(logits / temperature, dim=1)
    taught = F.log_softmax(teacher.to(logits.dtype) / temperature, dim=1)
    return temperature**2 * (taught.exp() * (taught - student)).sum(dim=1)


class FeatureBatchNorm(nn.Module):
    """Batch normalisation of features (n, dim) without gain and bias, with rows counted by weight.

    In train mode mean and (biased) variance are of this rank's rows, padding left out, and running ones move
    by `momentum`; so results depend on how a global batch is dealt to ranks. In eval mode, or on a rank whose
    rows are all padding, the running ones are used. Weights of 1 give `nn.BatchNorm1d(dim, affine=False)`.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, dim: int, *, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum = momentum
        self.eps = eps
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))

    def forward(self, features: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return features (n, dim), normalised; `weights` (n,), None for ones."""
        mean, var = self.running_mean, self.running_var
        if self.training:
            ones = torch.ones_like(features[:, :1])
            rows = ones if weights is None else weights[:, None].to(features.dtype)
            total = rows.sum()
            batch_mean = (rows * features).sum(dim=0) / total.clamp(min=1)
            batch_var = (rows * (features - batch_mean).square()).sum(dim=0) / total.clamp(min=1)
            has_rows = total > 0
            mean, var = torch.where(has_rows, batch_mean, mean), torch.where(has_rows, batch_var, var)
            self._move_statistics(batch_mean.detach(), batch_var.detach(), total)
        return (features - mean) * (var + self.eps).rsqrt()

    @torch.no_grad()
    def _move_statistics(self, mean: Tensor, var: Tensor, total: Tensor) -> None:
        step = self.momentum * (total > 0)
        unbiased = var * total / (total - 1).clamp(min=1)
        self.running_mean += step * (mean - self.running_mean)
        self.running_var += step * (unbiased - self.running_var)


def _new_head(dim: int, num_classes: int, *, is_masked: bool, seed: int) -> nn.Linear:
    """Return a linear layer whose weights come from a generator of its own."""
    # made on "meta", then filled: the constructor would draw from the global generator
    head = nn.Linear(dim, num_classes, bias=not is_masked, device="meta").to_empty(device="cpu")
    generator = named_generator(seed, "supervised head")
    if is_masked:
        # a mask chooses among these weights, so they need the size that keeps logits of order one
        nn.init.kaiming_normal_(head.weight, nonlinearity="relu", generator=generator)
        return head.requires_grad_(False)
    # small: the first loss is near log(num_classes), and not zero, so that the encoder has a gradient from
    # the first step
    nn.init.normal_(head.weight, std=0.01, generator=generator)
    nn.init.zeros_(head.bias)
    return head
