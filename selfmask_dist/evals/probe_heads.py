"""Linear probes by SGD, one for each learning rate and weight decay, all in one pass over the embeddings.

    heads W (dim + 1, heads * classes):  one product X W for all logits, one X^T R for all gradients
    tune:     all heads for a moment; of each decay, the rate that came nearest to its minimum goes on
    choose:   one head for each decay for longer; held-out samples choose the decay
    final:    that pair alone, from zero, on all training samples; tested once

One head alone costs the final fit. The first two are what choosing costs on top, and short enough to cost
about as much again. A decay asks for a minimum, and a rate is a way to it: so rates are judged by the loss
that they leave, and only decays by held-out samples.

Embeddings have a few directions of large variance and many of little, in which plain SGD does not arrive. So
features are turned into their principal components, of variances v, and a step in each is divided by

    v / 2 + decay        at least the loss's curvature in that direction (Boehning 1992)

The problem stays the same, `linear_probe`'s: turning changes no |W|. A rate means the same for every
backbone, and with 1 and all samples no step can fail. Ranks hold parts of the samples; a batch is the same
samples under any number of ranks, and the gradient is summed over them.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from selfmask_dist.evals.embeddings import Embeddings
from selfmask_dist.evals.probe import L2_GRID, Rows, check_probe, held_out, prepare
from selfmask_dist.evals.ranks import Alone, Ranks, gather_labels, share

# below 1 for batches that are a small part of the samples
LEARNING_RATES = (0.001, 0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.6, 1.0)
EPOCHS = 300
LENGTHS = (0.01, 0.12)  # of tuning and choosing, as shares of the final fit's epochs
_MOMENTUM = 0.9
_LEAST = 1e-7  # variances below it are rounding of float32
_BATCH = 8192
_LOGITS = 2**23  # at a time
Pair = tuple[float, float]  # learning rate, weight decay
Grid = tuple[Sequence[float], Sequence[float]]  # learning rates, weight decays; each is tried with each
GRID: Grid = (LEARNING_RATES, L2_GRID)


@dataclass(frozen=True)
class HeadsResult:
    """What the race and the final fit found.

    Attributes:
        accuracy: of the final fit on the test part, in [0, 1].
        lr, weight_decay: the pair chosen (see the module's docstring for their units).
        validation: accuracy of each pair on the held-out samples, where it was last.
        epochs: of each pair, before the final fit.
        predictions: (this rank's test samples,) int64 class ids.
    """

    accuracy: float
    lr: float
    weight_decay: float
    validation: dict[Pair, float]
    epochs: dict[Pair, int]
    predictions: Tensor


def probe_heads(
    train: Embeddings,
    test: Embeddings,
    *,
    grid: Grid = GRID,
    epochs: int = EPOCHS,
    batch_size: int | None = None,
    lengths: tuple[float, float] = LENGTHS,
    seed: int = 0,
    ranks: Ranks | None = None,
) -> HeadsResult:
    """Train a linear probe for every learning rate and weight decay, and return what the best one finds.
    Collective if `ranks` is.

    Features are standardised. A weight decay is `linear_probe`'s l2, chosen on the same held-out samples.

    Args:
        train, test, seed, ranks: as in `linear_probe`.
        grid: learning rates, and weight decays.
        epochs: of the final fit.
        batch_size: samples of a step, over all ranks; None for all of them, up to 8,192.
        lengths: how long, as shares of `epochs`, all pairs are trained, and then the best one of each decay.

    Raises:
        ValueError: as `linear_probe`; or no positive learning rate.
    """
    ranks = ranks or Alone()
    learning_rates, weight_decays = grid
    pairs = list(itertools.product(learning_rates, weight_decays))
    if not pairs or min(learning_rates) <= 0 or min(weight_decays) < 0:
        raise ValueError(
            f"learning rates must be above 0 and weight decays 0 or more, got {tuple(learning_rates)} and "
            f"{tuple(weight_decays)}"
        )
    classes = check_probe(train, test, ranks)
    targets, ids = torch.searchsorted(classes, train.labels), train.ids
    features = train.features.float()

    validation: dict[Pair, float] = {}
    trained: dict[Pair, int] = dict.fromkeys(pairs, 0)  # epochs
    best = pairs[0]
    if len(pairs) > 1:
        is_held_out = held_out(targets, ids, seed, ranks)
        fit, held, variances = _components(features[~is_held_out], features[is_held_out], ranks)
        fit_targets, held_targets = targets[~is_held_out], targets[is_held_out]
        batches = _Batches(fit, fit_targets, ids[~is_held_out], batch_size, seed, ranks)
        heads = _Heads(pairs, variances, len(classes))
        for stage, share_of_epochs in enumerate(lengths):
            length = max(1, round(share_of_epochs * epochs))
            heads.train(batches, length)
            for pair, score in zip(heads.pairs, heads.accuracies(held, held_targets, ranks), strict=True):
                validation[pair], trained[pair] = score, trained[pair] + length
            if stage == 0:
                heads = heads.best_of_each_decay(heads.losses(fit, fit_targets, ranks))
        best = max(heads.pairs, key=lambda pair: (validation[pair], pair[1]))

    fit, queries, variances = _components(features, test.features.float(), ranks)
    final = _Heads([best], variances, len(classes))
    final.train(_Batches(fit, targets, ids, batch_size, seed, ranks), epochs)
    predictions = classes[final.logits(queries)[:, 0].argmax(dim=1)]
    accuracy = share(predictions == test.labels, ranks)
    return HeadsResult(accuracy, *best, validation, trained, predictions)


def _components(fit: Tensor, other: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor, Tensor]:
    """Return both standardised and in the principal components of `fit` over all ranks, whose variances
    (dim,) come last.
    """
    fit, other = prepare(fit, other, True, ranks)
    rows = Rows(fit)
    sums = torch.zeros(rows.dim + 1, rows.dim, dtype=torch.float64, device=fit.device)
    sums[-1] = len(rows)
    for part in rows.parts(1):  # no float64 copy of all rows
        sums[:-1] += rows[part].T @ rows[part]
    sums = ranks.sum(sums)
    variances, directions = torch.linalg.eigh(sums[:-1] / sums[-1, 0])
    directions = directions.to(fit.dtype)
    return fit @ directions, other @ directions, variances.clamp(min=0).to(fit.dtype)


class _Batches:
    """This rank's rows of each batch; the batches are the same samples under any number of ranks."""

    def __init__(
        self,
        features: Tensor,
        targets: Tensor,
        ids: Tensor,
        batch_size: int | None,
        seed: int,
        ranks: Ranks,
    ) -> None:
        self._features, self._targets, self._ranks = features, targets, ranks
        self._generator = torch.Generator().manual_seed(seed)
        # place of every id among this rank's rows, -1 where another rank has it
        used = gather_labels(torch.zeros_like(ids), ids, ranks) >= 0
        self._used = used.nonzero().flatten().cpu()
        self._batch_size = batch_size or math.ceil(len(self._used) / math.ceil(len(self._used) / _BATCH))
        self._place = torch.full((len(used),), -1, dtype=torch.int64)
        self._place[ids.cpu()] = torch.arange(len(ids))

    @property
    def steps(self) -> int:
        """Batches of an epoch."""
        return math.ceil(len(self._used) / self._batch_size)

    def epoch(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Yield this rank's features and targets of each batch, and the batch's size over all ranks."""
        order = self._used[torch.randperm(len(self._used), generator=self._generator)]
        for chosen in order.split(self._batch_size):
            places = self._place[chosen]
            mine = places[places >= 0].to(self._features.device)
            yield self._features[mine], self._targets[mine], len(chosen)

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over ranks."""
        return self._ranks.sum(tensor)


class _Heads:
    """Heads side by side in one matrix, for features without correlations, of these variances (dim,)."""

    def __init__(
        self, pairs: list[Pair], variances: Tensor, num_classes: int, weights: Tensor | None = None
    ) -> None:
        self.pairs = pairs
        self._variances = variances
        # the bias is the weight of a last feature of 1, and is not decayed
        shape = (len(variances) + 1, len(pairs), num_classes)
        self._weights = variances.new_zeros(shape) if weights is None else weights
        self._lr, self._decay = variances.new_tensor(pairs).T[:, None, :, None]
        curvature = F.pad(variances, (0, 1), value=1.0)[:, None, None] / 2 + F.pad(
            self._decay.expand(len(variances), -1, -1), (0, 0, 0, 0, 0, 1)
        )
        self._step = self._lr / curvature.clamp(min=_LEAST)

    def best_of_each_decay(self, losses: list[float]) -> "_Heads":
        """Return, for each decay, the head with the smallest loss."""
        by_decay: dict[float, int] = {}
        for index, (_, decay) in enumerate(self.pairs):
            if decay not in by_decay or losses[index] < losses[by_decay[decay]]:
                by_decay[decay] = index
        chosen = list(by_decay.values())
        weights = self._weights[:, chosen]
        return _Heads([self.pairs[i] for i in chosen], self._variances, weights.shape[2], weights)

    def logits(self, features: Tensor) -> Tensor:
        """Return the logits (n, heads, classes) of features (n, dim)."""
        flat = self._weights.flatten(1)
        return torch.addmm(flat[-1], features, flat[:-1]).view(len(features), *self._weights.shape[1:])

    def train(self, batches: _Batches, epochs: int) -> None:
        """Train by SGD with Nesterov's momentum, under a cosine from each head's rate to 0."""
        velocity = torch.zeros_like(self._weights)
        total, step = epochs * batches.steps, 0
        for _ in range(epochs):
            for features, targets, batch_size in batches.epoch():
                gradient = batches.sum(self._gradient(features, targets)) / batch_size
                gradient[:-1] += self._decay * self._weights[:-1]
                gradient *= self._step
                velocity.mul_(_MOMENTUM).add_(gradient)
                rate = 0.5 * (1 + math.cos(math.pi * step / total))
                self._weights -= rate * (gradient + _MOMENTUM * velocity)
                step += 1

    def _gradient(self, features: Tensor, targets: Tensor) -> Tensor:
        """Return the gradient of the sum of these samples' losses, without the decay."""
        gradient = torch.zeros_like(self._weights)
        flat = gradient.flatten(1)
        for part, classes in self._parts(features, targets):
            residual = self.logits(part).softmax(dim=2)
            residual[torch.arange(len(part), device=part.device), :, classes] -= 1
            flat[:-1].addmm_(part.T, residual.flatten(1))
            flat[-1] += residual.flatten(1).sum(dim=0)
        return gradient

    def _parts(self, features: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        size = max(1, _LOGITS // self._weights[0].numel())
        return zip(features.split(size), targets.split(size), strict=True)

    def losses(self, features: Tensor, targets: Tensor, ranks: Ranks) -> list[float]:
        """Return what each head's training minimises, over all ranks' samples; infinity where it diverged."""
        sums = features.new_zeros(len(self.pairs) + 1, dtype=torch.float64)
        for part, classes in self._parts(features, targets):
            log_p = self.logits(part).log_softmax(dim=2)
            chosen = log_p.gather(2, classes[:, None, None].expand(-1, len(self.pairs), 1))
            sums -= F.pad(chosen.squeeze(2).double().sum(dim=0), (0, 1), value=-len(part))
        *losses, total = ranks.sum(sums).tolist()
        penalties = (0.5 * self._decay * self._weights[:-1].square()).sum(dim=(0, 2)).tolist()
        found = [loss / total + penalty for loss, penalty in zip(losses, penalties, strict=True)]
        return [loss if math.isfinite(loss) else math.inf for loss in found]

    def accuracies(self, features: Tensor, targets: Tensor, ranks: Ranks) -> list[float]:
        """Return the accuracy of each head over all ranks' samples; 0 where it diverged."""
        sums = features.new_zeros(len(self.pairs) + 1, dtype=torch.float64)
        for part, classes in self._parts(features, targets):
            logits = self.logits(part)
            hits = (logits.argmax(dim=2) == classes[:, None]) & logits.isfinite().all(dim=2)
            sums += F.pad(hits.double().sum(dim=0), (0, 1), value=len(part))
        *hits_of_all, total = ranks.sum(sums).tolist()
        return [hits / total for hits in hits_of_all]
