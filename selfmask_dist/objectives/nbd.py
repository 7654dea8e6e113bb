"""Neighbour-softened instance targets against a bank of all pictures; no labels.

Every picture i of the N is a class of its own, and its nearest neighbours under the frozen backbone count as
partly the same. With t_i the mean of the frozen features of a few views of i, mu their mean, V their first
principal directions and lambda the variances along them,

    P = V diag(lambda + shrinkage mean(lambda))^(-1/2)             the whitening
    a_i = unit((t_i - mu) P)                                       the bank's first rows
    q_i(i) = own_share,   q_i(j) = (1 - own_share) softmax_j(a_i . a_j / neighbour_temperature)
                                                                   over the nearest j; fixed from then on, or
                                                                   found anew every `renew_every` epochs
    z = unit(f W + b),   at first W = P, b = - mu P                the head
    loss = mean_i - sum_j q_i(j) log softmax_j(z_i . unit(a_j) / temperature)          over all N

Head and bank are first trained alone on the frozen views; then, with the masks, by AdamW at a constant rate,
and after each step the row of every picture of the batch moves towards its embedding:
a_i <- unit(keep unit(a_i) + (1 - keep) z_i).

The bank is shared out over ranks (see `bank`); a softmax over more than `exact_up_to` pictures is estimated
from a sample of them, equal in expectation. Head and bank are thrown away.

Ingredients: a class for every picture (DIET: Ibrahim et al., arXiv 2302.10260; Wu et al., arXiv 1805.01978,
with its memory bank), neighbours as the same (NNCLR: Dwibedi et al., arXiv 2104.14548), whitened features
(Caron et al., DeepCluster, arXiv 1807.05520). Knows neither masks, optimizers nor process groups.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selfmask_dist.backbones import Backbone
from selfmask_dist.common.seeding import named_generator
from selfmask_dist.config import Config
from selfmask_dist.config.objectives import NbdConfig
from selfmask_dist.data import Batch
from selfmask_dist.objectives.bank import AdamW, ShardedBank, draw_candidates, flat_sum
from selfmask_dist.objectives.base import BufferPart, Context, Objective
from selfmask_dist.objectives.parts import Watch, at_least_float32, encode_views

_ROWS = "bank"  # the bank's rows, beside the head's two tensors


def build(config: Config, backbone: Backbone, classes: tuple[str, ...], context: Context) -> "Nbd":
    """Return the objective on a backbone's features; class names are not looked at."""
    return Nbd(backbone.spec.dim, config.nbd, context, seed=config.seed)


@dataclass(frozen=True)
class Whitening:
    """Features (..., in_dim) -> (features - mean) @ projection, (..., dim)."""

    mean: Tensor
    projection: Tensor


@dataclass(frozen=True)
class WarmupViews:
    """Frozen features that the warm-up draws from.

    pictures: (m,) int64, this rank's, ascending; features: (m, views, in_dim) of them.
    """

    pictures: Tensor
    features: Tensor


# (bank (n, dim), present (n,), k) -> similarities and pictures (n, k) of each row's nearest others in all of
# the bank, on whatever ranks
Search = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


class Nbd(Objective):
    """See the module's docstring; metrics `loss` and `concentration` (length of the mean unit embedding).

    Args:
        in_dim: length of the encoder's features.
        context: this rank's place, the number of pictures, and how to sum over ranks.

    Before the first step, `begin` gives it frozen features, or `take_buffers` an earlier state.
    search: set by whoever trains where targets are found anew (`renew_every`). Collective.
    loss_factor: what the loss is multiplied by before backward, which an engine may do; the gradients of
        head and bank, which no engine holds, are divided by it.
    """

    buffers_all_change = True

    def __init__(self, in_dim: int, config: NbdConfig, context: Context, *, seed: int = 0) -> None:
        super().__init__()
        self.config, self.context, self.seed = config, context, seed
        self.loss_factor = 1.0
        self.search: Search | None = None
        num = context.num_samples
        self.dim = min(config.dim, in_dim, max(num - 1, 1))
        self.bank = ShardedBank(num, self.dim, min(config.neighbours, num - 1), context)
        self.weight, self.bias = torch.zeros(in_dim, self.dim), torch.zeros(self.dim)
        self._adamw = AdamW(self._trained())
        self._batches: list[tuple[Tensor, Tensor, Tensor]] = []  # of the step so far: ids, embeddings, counts
        self._step = 0
        self._watch = Watch(
            "NBD",
            trivial=math.log(max(num, 2)),
            advice="Lower optim.score_lr, or raise nbd.warmup_steps",
        )

    # ---- before the first step

    @property
    def warmup_draws(self) -> tuple[Tensor, Tensor]:
        """The pictures and the views that the warm-up draws, each (steps, batch) int64, the same on every
        rank.
        """
        section = self.config
        generator = named_generator(self.seed, "nbd warm-up")
        shape = (section.warmup_steps, section.warmup_batch)
        pictures = torch.randint(self.context.num_samples, shape, generator=generator)
        return pictures, torch.randint(2**20, shape, generator=generator)

    def begin(
        self, targets: Tensor, whitening: Whitening, views: WarmupViews, present: Tensor, search: Search
    ) -> None:
        """Fill head, bank and targets from frozen features, and train head and bank alone for a while.

        Collective: every rank must call.

        Args:
            targets: (n, in_dim), t_i of this rank's pictures r, r + W, ...
            present: (n,) bool, false where a picture could not be read.
        """
        # laid out in memory as after a resume, or products would round differently
        self.weight = whitening.projection.contiguous()
        self.bias = -(whitening.mean @ whitening.projection)
        bank = self.bank
        bank.rows = F.normalize(targets @ self.weight + self.bias, dim=1) * present[:, None]
        bank.present = present
        self._aim(search, bank.rows)
        self._adamw = AdamW(self._trained())
        self._warm_up(views)
        self._adamw = AdamW(self._trained())

    @torch.no_grad()
    def _aim(self, search: Search, rows: Tensor) -> None:
        """Set every picture's targets by its nearest others among unit rows. Collective."""
        bank, k = self.bank, self.bank.neighbours.shape[1]
        if k:
            similar, bank.neighbours = search(rows, bank.present, k)
            shares = (similar / self.config.neighbour_temperature).softmax(dim=1)
            bank.shares = (1 - self.config.own_share) * shares
        else:
            bank.neighbours, bank.shares = bank.neighbours.to(rows.device), bank.shares.to(rows.device)

    def _warm_up(self, views: WarmupViews) -> None:
        """Train head and bank on frozen views, each rank its rows of every batch."""
        section, context = self.config, self.context
        drawn, which = self.warmup_draws
        rank, size = context.rank, context.world_size
        factor, self.loss_factor = self.loss_factor, 1.0
        device = self.weight.device
        for step in range(len(drawn)):
            ids, view = drawn[step].to(device), which[step].to(device) % views.features.shape[1]
            features = self.weight.new_zeros(len(ids), self.weight.shape[0])
            is_own = ids % size == rank
            places = torch.searchsorted(views.pictures, ids[is_own])
            features[is_own] = views.features[places, view[is_own]]
            features = context.all_reduce(features)
            # as many on every rank; rows that repeat others do not count
            own = torch.arange(rank, -(-len(ids) // size) * size, size, device=device)
            counts, own = (own < len(ids)).to(features), own % len(ids)
            with torch.enable_grad():
                loss, _ = self._loss(features[own, None], ids[own], counts, len(ids))
                loss.backward()
            self._batches = []
            self._update(section.warmup_rate, section.weight_decay)
        self.loss_factor = factor

    # ---- a step

    def start_step(self, step: int) -> None:
        """As `Objective.start_step`; where targets are to be found anew, collective."""
        self._step = step
        if self.config.renew_every is None or step == 0:
            return
        every = max(round(self.config.renew_every * self.context.steps_per_epoch), 1)
        if step % every == 0:
            assert self.search is not None, "whoever trains gives `search`"
            self._aim(self.search, F.normalize(self.bank.rows.detach(), dim=1))

    def forward(self, encoder: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """As `Objective.forward`; rows of weight 0 have no influence. Collective: every rank must call."""
        rows, num_views = len(batch.weights), len(batch.views)
        features = encode_views(encoder, batch.views)
        with torch.autocast(features.device.type, enabled=False):
            features = at_least_float32(features).view(num_views, rows, -1).transpose(0, 1)
            return self._loss(features, batch.ids, batch.weights, batch.global_count)

    def _loss(
        self, features: Tensor, ids: Tensor, weights: Tensor, global_count: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of features (rows, views, in_dim) and metrics, as this rank's shares."""
        context, temperature = self.context, self.config.temperature
        for tensor in self._trained().values():
            tensor.requires_grad_(True)
        own = F.normalize(features @ self.weight + self.bias, dim=2)
        embeddings = context.gather(own)
        everyone = context.gather(torch.stack([ids.double(), weights.double()], dim=1))  # ids are exact in it
        all_ids, counts = everyone[:, 0].round().long(), everyone[:, 1].to(features.dtype)
        with torch.no_grad():
            targets, shares = self.bank.targets_of(all_ids)
        sums = self.bank.sums(
            embeddings, targets, shares, temperature=temperature, candidates=self._candidates()
        )
        mass, positive = context.all_reduce_with_gradient(sums)
        losses = (mass.log() + 1 / temperature - positive).mean(1)[context.own_columns(len(ids), ids.device)]
        share = weights.double() / global_count
        loss = torch.where(share > 0, losses * share, 0).sum().to(features.dtype)
        with torch.no_grad():
            mean = F.normalize(embeddings.mean(1), dim=1)
            self._batches.append((all_ids, mean, counts))
            length = (mean * counts[:, None]).sum(0).norm() / counts.sum().clamp(min=1)
        return loss, {"loss": loss.detach(), "concentration": length * share.sum().to(features.dtype)}

    def _candidates(self) -> Tensor | None:
        """Return the pictures of a sampled softmax, the same on every rank; None for all of them."""
        num, section = self.context.num_samples, self.config
        if num <= section.exact_up_to:
            return None
        purpose = f"nbd candidates {self._step} {len(self._batches)}"
        count = min(section.sampled, num)
        return draw_candidates(num, count, named_generator(self.seed, purpose)).to(self.weight.device)

    def after_step(self) -> None:
        """Move head and bank: by gradients, then the batch's rows towards its embeddings. Collective."""
        batches, self._batches = self._batches, []
        self._update(self.config.rate, self.config.weight_decay)
        for ids, embeddings, counts in batches:
            counted = counts > 0
            self.bank.move_towards(ids[counted], embeddings[counted], self.config.bank_momentum)

    @torch.no_grad()
    def _update(self, rate: float, decay: float) -> None:
        trained = self._trained()
        grads = {
            name: torch.zeros_like(tensor) if tensor.grad is None else tensor.grad / self.loss_factor
            for name, tensor in trained.items()
        }
        # a rank's rows have their whole gradient, as its sums are over the global batch
        of_head = [name for name in trained if name != _ROWS]
        grads |= zip(of_head, flat_sum(self.context, [grads[name] for name in of_head]), strict=True)
        for tensor in trained.values():
            tensor.requires_grad_(False)
            tensor.grad = None
        self._adamw.step(trained, grads, rate=rate, decay=decay)

    def _trained(self) -> dict[str, Tensor]:
        return {"weight": self.weight, "bias": self.bias, _ROWS: self.bank.rows}

    # ---- state, and what is said

    def _state(self) -> dict[str, Tensor]:
        """Return everything that is trained or fixed at the start, with this rank's rows of the bank."""
        state = dict(self._trained())
        state |= {f"first_{name}": tensor for name, tensor in self._adamw.first.items()}
        state |= {f"second_{name}": tensor for name, tensor in self._adamw.second.items()}
        bank = self.bank
        state |= {"neighbours": bank.neighbours, "shares": bank.shares, "present": bank.present}
        return state

    def buffer_parts(self) -> list[BufferPart]:
        """Return head, bank, targets and moments, rows in the order of the pictures. Collective."""
        num, parts = self.bank.num_pictures, []
        for name, tensor in self._state().items():
            if not _is_sharded(name):
                parts.append(BufferPart(name, tensor.shape, tensor.detach()))
                continue
            first, rows = self.context.in_order(tensor.detach(), num)
            row = tensor.shape[1:]
            shape = torch.Size((num, *row))
            parts.append(BufferPart(name, shape, rows, first * row.numel(), is_on_all=False))
        num_updates = torch.tensor(self._adamw.num_updates)
        return [*parts, BufferPart("num_updates", num_updates.shape, num_updates)]

    @torch.no_grad()
    def take_buffers(self, parts: Sequence[BufferPart]) -> None:
        device, num = self.bank.rows.device, self.bank.num_pictures
        state = {part.name: part.tensor for part in parts}
        self._adamw.num_updates = int(state.pop("num_updates"))
        self._set_state(
            {
                name: (self.context.dealt(tensor, num) if _is_sharded(name) else tensor).to(device).clone()
                for name, tensor in state.items()
            }
        )
        self._batches = []

    def _set_state(self, state: Mapping[str, Tensor]) -> None:
        bank = self.bank
        self.weight, self.bias, bank.rows = (state[name] for name in ("weight", "bias", _ROWS))
        bank.neighbours, bank.shares, bank.present = (
            state[name] for name in ("neighbours", "shares", "present")
        )
        self._adamw.first = {name: state[f"first_{name}"] for name in self._trained()}
        self._adamw.second = {name: state[f"second_{name}"] for name in self._trained()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Nbd":
        """Move what is neither a parameter nor a buffer along with `to`."""
        super()._apply(fn, recurse)
        self._set_state({name: fn(tensor.detach()) for name, tensor in self._state().items()})
        return self

    def remarks(self, values: Mapping[str, float]) -> list[str]:
        return self._watch(values)


def _is_sharded(name: str) -> bool:
    return name.endswith(_ROWS) or name in ("neighbours", "shares", "present")
