"""SwAV: crops of one image predict each other's assignment to prototypes; no labels.

With z = unit(P encoder(crop)) and scores s = z C^T over the unit rows of the prototypes C, for the crops i
that give assignments (the first two) and all other crops v,

    q_i = sinkhorn(s_i of the whole global batch and the queue)         no gradient
    loss = mean_i mean_{v != i} - sum_k q_i[k] log softmax(s_v / temperature)[k]

Sinkhorn, on Q = exp(s / epsilon): `iterations` times, each prototype's total over all samples is made equal,
then each sample's total is made 1. Sums run over the global batch, so the loss does not depend on how the
batch is dealt to ranks. The queue holds the newest embeddings of the global batches before, each rank its own
rows; it fills from `queue_start` on and is used once it is full.

Source: Caron et al., arXiv 2006.09882; Warmerdam et al. 2024, section 3.3: one linear projector, which is
thrown away with the prototypes. Knows neither masks, optimizers nor process groups: `all_reduce` is passed
in.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selfmask_dist.backbones import Backbone
from selfmask_dist.common.seeding import named_generator
from selfmask_dist.config import Config
from selfmask_dist.config.objectives import SwavConfig
from selfmask_dist.data import Batch
from selfmask_dist.objectives.base import BufferPart, Context, Objective
from selfmask_dist.objectives.parts import Watch, at_least_float32, encode_views, linear

AllReduce = Callable[[Tensor], Tensor]

_JUMP = 1.25  # a loss that grows by this factor where the queue comes in


def build(config: Config, backbone: Backbone, classes: tuple[str, ...], context: Context) -> "Swav":
    """Return SwAV on a backbone's features; class names are not looked at."""
    return Swav(backbone.spec.dim, config.swav, context, seed=config.seed)


class Swav(Objective):
    """See the module's docstring; metrics `loss`, `concentration` (length of the mean unit embedding: 1 where
    all images look the same) and `queue` (1 while the queue takes part).

    Args:
        in_dim: length of the encoder's features.
        context: this rank's place, the global batch size, and how to sum over ranks.

    Raises:
        ValueError: a queue that ranks cannot share equally.
    """

    queue: Tensor

    def __init__(self, in_dim: int, config: SwavConfig, context: Context, *, seed: int = 0) -> None:
        super().__init__()
        _check(config, context)
        self.config = config
        self.context = context
        generator = named_generator(seed, "swav projector and prototypes")
        self.projector = linear(in_dim, config.dim, generator)
        self.prototypes = Prototypes(config.dim, config.prototypes, generator)
        # not in the module's state dict: each rank holds its own rows, see `buffer_parts`
        shape = (2, config.queue_length // context.world_size, config.dim)
        self.register_buffer("queue", torch.zeros(shape), persistent=False)
        self._queue_rows = 0  # pushed so far by all ranks; not a tensor: reading one would stop a GPU
        self._step = 0
        self._loss_before_queue: float | None = None
        self._has_told_jump = False
        self._watch = Watch(
            "SwAV",
            trivial=math.log(config.prototypes),
            advice="Lower swav.epsilon (0.02, 0.01), optim.score_lr or optim.head_lr, or raise "
            "train.global_batch_size",
        )

    # ---- a step

    def start_step(self, step: int) -> None:
        self._step = step
        self.prototypes.is_frozen = step < self.config.freeze_steps

    def forward(self, encoder: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """As `Objective.forward`; rows of weight 0 have no influence. Collective: every rank must call."""
        num_views, rows = len(batch.views), len(batch.weights)
        assert batch.views[0].shape == batch.views[1].shape, (
            "two crops of the first resolution give assignments"
        )
        assigning = [0, 1]
        with_queue = self.is_queue_used
        features = encode_views(encoder, batch.views)
        # float32 under autocast too: bf16 keeps 8 bits of a similarity that is then divided by 0.05
        with torch.autocast(features.device.type, enabled=False):
            features = at_least_float32(features)
            embeddings = F.normalize(self.projector(features), dim=1).view(num_views, rows, -1)
            scores = self.prototypes(embeddings)
            with torch.no_grad():
                targets, mean_length = self._assign(embeddings, scores, assigning, batch.weights)
                self._push(embeddings[assigning].detach(), batch)
            log_probabilities = F.log_softmax(scores / self.config.temperature, dim=2)
            # - sum_k q_i[k] log p_v[k] for every pair (i, v): (assigning, views, rows)
            losses = -torch.einsum("ibk,vbk->ivb", targets, log_probabilities)
            share = batch.weights.to(losses.dtype) / batch.global_count
            others = torch.ones(len(assigning), num_views, dtype=losses.dtype, device=losses.device)
            others[range(len(assigning)), assigning] = 0
            others /= len(assigning) * (num_views - 1)
            loss = (losses @ share * others).sum()
        fraction = share.sum()
        metrics = {
            "loss": loss.detach(),
            "concentration": mean_length * fraction,
            "queue": fraction * float(with_queue),
        }
        return loss, metrics

    def _assign(
        self, embeddings: Tensor, scores: Tensor, assigning: list[int], weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return assignments (assigning, rows, prototypes), and the length of the mean unit embedding."""
        chosen, columns = scores[assigning].detach(), weights.expand(len(assigning), -1)
        if self.is_queue_used:
            queued = self.prototypes(self.queue.to(embeddings.dtype))
            chosen = torch.cat([chosen, queued], dim=1)
            columns = torch.cat([columns, self.queue.any(dim=2).to(columns)], dim=1)
        first = weights[:, None] * embeddings[0].detach()
        mean = torch.cat([first.sum(0), weights.sum()[None].to(first)])
        passenger = Passenger(self.context.all_reduce, mean)  # for no all-reduce of its own
        targets = sinkhorn(
            chosen,
            columns,
            epsilon=self.config.epsilon,
            iterations=self.config.sinkhorn_iterations,
            all_reduce=passenger,
        )
        total = passenger.total
        return targets[:, : len(weights)], total[:-1].norm() / total[-1].clamp(min=1)

    # ---- the queue

    @property
    def is_queue_used(self) -> bool:
        """Say whether the queue is full, so that no empty place takes part; the same on every rank."""
        length = self.config.queue_length
        return bool(length) and self._queue_rows >= length

    def _push(self, embeddings: Tensor, batch: Batch) -> None:
        """Put (2, rows, dim) in front of the older ones; rows that broke leave an empty place.

        A ragged last batch is left out: its padding depends on the number of ranks.
        """
        length = self.queue.shape[1]
        if not length or self._step < self.config.queue_start(self.context.steps_per_epoch):
            return
        if batch.global_count < self.context.global_batch_size:
            return
        rows = embeddings * batch.weights[:, None].to(embeddings)
        self.queue = torch.cat([rows.to(self.queue), self.queue], dim=1)[:, :length].contiguous()
        self._queue_rows += embeddings.shape[1] * self.context.world_size

    def buffer_parts(self) -> list[BufferPart]:
        """Return the queue, the newest rows first, as one process would hold it. Collective."""
        length, dim = self.config.queue_length, self.config.dim
        parts = []
        for index, rows in enumerate(self.queue):  # ranks take the rows of a batch in turn
            first, block = self.context.in_order(rows, length)
            start = (index * length + first) * dim
            parts.append(BufferPart("queue", torch.Size((2, length, dim)), block, start, is_on_all=False))
        queue_rows = torch.tensor(self._queue_rows)
        return [*parts, BufferPart("queue_rows", queue_rows.shape, queue_rows)]

    def take_buffers(self, parts: Sequence[BufferPart]) -> None:
        *blocks, queue_rows = (part.tensor for part in parts)
        rows = [self.context.dealt(block, self.config.queue_length) for block in blocks]
        self.queue = torch.stack(rows).to(self.queue)
        self._queue_rows = int(queue_rows)

    # ---- what is trained, and what is said

    def head_parameters(self) -> list[nn.Parameter]:
        return [*self.projector.parameters(), *self.prototypes.parameters()]

    def held_parameters(self) -> list[nn.Parameter]:
        return [self.prototypes.weight] if self.prototypes.is_frozen else []

    def unit_rows(self) -> list[nn.Parameter]:
        return [self.prototypes.weight]

    def remarks(self, values: Mapping[str, float]) -> list[str]:
        """Return the news of a collapse, of a loss that says that nothing is learned, and of a jump of the
        loss where the queue comes in; each once.
        """
        found = self._watch(values)
        loss, before = values["loss"], self._loss_before_queue
        if not values["queue"]:
            self._loss_before_queue = loss
        elif before is not None and loss > _JUMP * before and not self._has_told_jump:
            self._has_told_jump = True
            found.append(
                f"the loss went from {before:.3f} to {loss:.3f} as the queue came in: its embeddings are of "
                "older masks. A later swav.queue_start_epoch or a lower optim.score_lr changes them less; it "
                "usually recovers"
            )
        return found


class Prototypes(nn.Module):
    """Unit rows C (prototypes, dim); embeddings (..., dim) -> similarities (..., prototypes).

    `is_frozen`: the gradient is exactly zero. It is not left out, because engines wait for one.
    """

    def __init__(self, dim: int, count: int, generator: torch.Generator) -> None:
        super().__init__()
        rows = torch.randn(count, dim, generator=generator)
        self.weight = nn.Parameter(F.normalize(rows, dim=1))
        self.is_frozen = False

    def forward(self, embeddings: Tensor) -> Tensor:
        weight = self.weight
        if self.is_frozen:
            return embeddings @ (weight.detach() + 0 * (weight - weight.detach())).T
        return embeddings @ weight.T


class Passenger:
    """An `all_reduce` whose first call sums a small tensor along with its own."""

    def __init__(self, all_reduce: AllReduce, tensor: Tensor) -> None:
        self._all_reduce = all_reduce
        self._waiting: Tensor | None = tensor
        self.total = tensor

    def __call__(self, tensor: Tensor) -> Tensor:
        if self._waiting is None:
            return self._all_reduce(tensor)
        both = self._all_reduce(torch.cat([tensor.flatten(), self._waiting.to(tensor)]))
        self.total, self._waiting = both[tensor.numel() :].to(self._waiting), None
        return both[: tensor.numel()].view_as(tensor)


@torch.no_grad()
def sinkhorn(
    scores: Tensor,
    weights: Tensor | None = None,
    *,
    epsilon: float,
    iterations: int = 3,
    all_reduce: AllReduce = lambda tensor: tensor,
) -> Tensor:
    """Return soft assignments of samples to prototypes, with all prototypes used alike.

    Collective: every rank must call, with its rows.

    Args:
        scores: (..., rows, prototypes), cosine similarities: -1 .. 1. Leading dims are problems of their own.
        weights: (..., rows), 0 for rows that do not count; None for ones.
        epsilon: smoothness; the smaller, the nearer to one prototype a sample.
        all_reduce: sums a tensor over ranks.

    Returns:
        (..., rows, prototypes), each row summing to 1, in the dtype of `scores`. Computed in float64.
    """
    # The shift by 1 cancels, and keeps exp at most 1. float64 holds it for every score in -1 .. 1 down to an
    # epsilon of 0.005, which is the smallest that swav.epsilon allows.
    mass = ((scores.double() - 1) / epsilon).exp()
    counted = torch.ones_like(mass[..., :1]) if weights is None else weights[..., None].double()
    for _ in range(iterations):
        totals = all_reduce((counted * mass).sum(dim=-2, keepdim=True).contiguous())
        mass = mass / totals
        mass = mass / mass.sum(dim=-1, keepdim=True)
    return mass.to(scores.dtype)


def _check(config: SwavConfig, context: Context) -> None:
    if config.queue_length % context.world_size:
        near = max(round(config.queue_length / context.world_size), 1) * context.world_size
        raise ValueError(
            f"swav.queue_length {config.queue_length} is not divisible by world size {context.world_size}; "
            f"set it to {near}"
        )
