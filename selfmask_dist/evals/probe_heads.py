"""Linear probes by SGD, one for each learning rate and weight decay, all in one pass over the embeddings.

    heads W (dim + 1, heads * classes):  one product X W for all logits, one X^T R for all gradients
    race:     all heads for a few epochs, the better ones (on held-out samples) for more, ...
    final:    the best pair alone, from zero, on all training samples; tested once

One head alone costs the final fit. The race is what choosing costs on top: it is cut so short that it costs
about as much again (`RUNGS`). Each rung is a cosine of its own down to zero, so that heads are compared at
rest. Ranks hold parts of the samples; a batch is the same samples under any number of ranks, and the
gradient is summed over them.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from selfmask_dist.evals.probe import check_probe, held_out, prepare
from selfmask_dist.evals.ranks import Alone, Ranks, gather_labels, share

LEARNING_RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
WEIGHT_DECAYS = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3)
RUNGS = ((1.0, 0.01), (0.25, 0.02), (0.08, 0.06))  # (share of the heads, share of the final fit's epochs)
_MOMENTUM = 0.9


@dataclass(frozen=True)
class HeadsResult:
    """What the race and the final fit found.

    Attributes:
        accuracy: of the final fit on the test part, in [0, 1].
        lr, weight_decay: the pair chosen; lr as given, for features of unit length (see `probe_heads`).
        validation: accuracy of each pair on the held-out samples, where it was last in the race.
        epochs: of each pair, in the race.
        predictions: (this rank's test samples,) int64 class ids.
    """

    accuracy: float
    lr: float
    weight_decay: float
    validation: dict[tuple[float, float], float]
    epochs: dict[tuple[float, float], int]
    predictions: Tensor


def probe_heads(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    learning_rates: Sequence[float] = LEARNING_RATES,
    weight_decays: Sequence[float] = WEIGHT_DECAYS,
    epochs: int = 100,
    batch_size: int = 256,
    rungs: Sequence[tuple[float, float]] = RUNGS,
    validation_fraction: float = 0.2,
    seed: int = 0,
    ranks: Ranks | None = None,
    train_ids: Tensor | None = None,
) -> HeadsResult:
    """The best of len(learning_rates) * len(weight_decays) linear probes. Collective if `ranks` is.

    Features are standardised, and divided by sqrt(dim) so that they have unit length on average and a
    learning rate means the same for every backbone.

    Args:
        train, test, their labels, seed, ranks, train_ids: as in `linear_probe`.
        epochs: of the final fit. batch_size: samples of a step, over all ranks.
        rungs: of the race: share of the heads that take part, and of `epochs` that each rung lasts.

    Raises:
        ValueError: as `linear_probe`; or no positive learning rate.
    """
    ranks = ranks or Alone()
    pairs = list(itertools.product(learning_rates, weight_decays))
    if not pairs or min(learning_rates) <= 0 or min(weight_decays) < 0:
        raise ValueError(
            f"learning rates must be above 0 and weight decays 0 or more, got {tuple(learning_rates)} and "
            f"{tuple(weight_decays)}"
        )
    classes = check_probe(train, train_labels, test, test_labels, ranks)
    targets = torch.searchsorted(classes, train_labels)
    ids = train_ids if train_ids is not None else torch.arange(len(train), device=train.device)
    scale = train.shape[1] ** -0.5
    train, test = train.float(), test.float()

    validation: dict[tuple[float, float], float] = {}
    lengths: dict[tuple[float, float], int] = dict.fromkeys(pairs, 0)
    if len(pairs) > 1:
        is_held_out = held_out(targets, ids, validation_fraction, seed, ranks)
        fit, held = prepare(train[~is_held_out], train[is_held_out], True, ranks)
        batches = _Batches(fit * scale, targets[~is_held_out], ids[~is_held_out], batch_size, seed, ranks)
        heads = _Heads(pairs, train.shape[1], len(classes), train.device)
        for kept, part in rungs:
            heads = heads.best(max(1, round(kept * len(pairs))), validation)
            length = max(1, round(part * epochs))
            heads.train(batches, length)
            found = heads.accuracies(held * scale, targets[is_held_out], ranks)
            for pair, accuracy in zip(heads.pairs, found, strict=True):
                validation[pair], lengths[pair] = accuracy, lengths[pair] + length
        best = heads.best(1, validation).pairs[0]
    else:
        best = pairs[0]

    fit, test = prepare(train, test, True, ranks)
    final = _Heads([best], train.shape[1], len(classes), train.device)
    final.train(_Batches(fit * scale, targets, ids, batch_size, seed, ranks), epochs)
    predictions = classes[final.logits(test * scale)[:, 0].argmax(dim=1)]
    accuracy = share(predictions == test_labels, ranks)
    return HeadsResult(accuracy, *best, validation, lengths, predictions)


class _Batches:
    """This rank's rows of each batch; the batches are the same samples under any number of ranks."""

    def __init__(
        self, features: Tensor, targets: Tensor, ids: Tensor, batch_size: int, seed: int, ranks: Ranks
    ) -> None:
        self._features, self._targets, self._ranks = features, targets, ranks
        self._generator = torch.Generator().manual_seed(seed)
        self._batch_size = batch_size
        # place of every id among this rank's rows, -1 where another rank has it
        used = gather_labels(torch.zeros_like(ids), ids, ranks) >= 0
        self._used = used.nonzero().flatten().cpu()
        self._place = torch.full((len(used),), -1, dtype=torch.int64)
        self._place[ids.cpu()] = torch.arange(len(ids))

    @property
    def steps(self) -> int:
        """In an epoch."""
        return math.ceil(len(self._used) / self._batch_size)

    def epoch(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Features, targets and the global size of each batch."""
        order = self._used[torch.randperm(len(self._used), generator=self._generator)]
        for chosen in order.split(self._batch_size):
            places = self._place[chosen]
            mine = places[places >= 0].to(self._features.device)
            yield self._features[mine], self._targets[mine], len(chosen)

    def sum(self, tensor: Tensor) -> Tensor:
        return self._ranks.sum(tensor)


class _Heads:
    """Heads side by side in one matrix, with their momentum."""

    def __init__(
        self,
        pairs: list[tuple[float, float]],
        dim: int,
        num_classes: int,
        device: torch.device,
        weights: Tensor | None = None,
    ) -> None:
        self.pairs = pairs
        # the bias is the weight of a last feature of 1
        self._weights = weights if weights is not None else torch.zeros(dim + 1, len(pairs), num_classes)
        self._weights = self._weights.to(device)
        lr, decay = torch.tensor(pairs, device=device).T[:, None, :, None]
        self._lr, self._decay = lr, decay

    def best(self, count: int, accuracies: dict[tuple[float, float], float]) -> "_Heads":
        """The `count` most accurate heads; of equal ones the larger decay, then the smaller rate."""
        if count >= len(self.pairs):
            return self
        order = sorted(
            range(len(self.pairs)),
            key=lambda i: (-accuracies[self.pairs[i]], -self.pairs[i][1], self.pairs[i][0]),
        )[:count]
        chosen = [self.pairs[i] for i in order]
        dim, _, num_classes = self._weights.shape
        return _Heads(chosen, dim - 1, num_classes, self._weights.device, self._weights[:, order])

    def logits(self, features: Tensor) -> Tensor:
        """(n, heads, classes)."""
        flat = self._weights.flatten(1)
        return torch.addmm(flat[-1], features, flat[:-1]).view(len(features), *self._weights.shape[1:])

    def train(self, batches: _Batches, epochs: int) -> None:
        """SGD with momentum under a cosine from each head's rate to 0."""
        velocity = torch.zeros_like(self._weights)
        total, step = epochs * batches.steps, 0
        for _ in range(epochs):
            for features, targets, batch_size in batches.epoch():
                residual = self.logits(features).softmax(dim=2)
                residual[torch.arange(len(targets), device=targets.device), :, targets] -= 1
                flat = residual.flatten(1)
                gradient = torch.cat([features.T @ flat, flat.sum(dim=0, keepdim=True)]) / batch_size
                gradient = batches.sum(gradient).view_as(velocity)
                gradient[:-1] += self._decay * self._weights[:-1]
                velocity.mul_(_MOMENTUM).add_(gradient)
                rate = self._lr * (0.5 * (1 + math.cos(math.pi * step / total)))
                self._weights -= rate * velocity
                step += 1

    def accuracies(self, features: Tensor, targets: Tensor, ranks: Ranks) -> list[float]:
        """Of each head over all ranks' samples; a head that diverged has 0."""
        logits = self.logits(features)
        hits = (logits.argmax(dim=2) == targets[:, None]) & logits.isfinite().all(dim=2)
        counts = ranks.sum(torch.cat([hits.sum(dim=0), targets.new_tensor([len(targets)])]))
        values: list[float] = (counts[:-1].double() / counts[-1]).tolist()
        return values
