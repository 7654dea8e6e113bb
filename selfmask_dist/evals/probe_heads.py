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
Pair = tuple[float, float]  # learning rate, weight decay


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
    validation: dict[Pair, float]
    epochs: dict[Pair, int]
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
    batch_size: int | None = None,
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
        epochs: of the final fit.
        batch_size: samples of a step, over all ranks; None for a fiftieth of them, from 16 to 1,024.
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

    scores: dict[Pair, tuple[float, float]] = {}
    lengths: dict[Pair, int] = dict.fromkeys(pairs, 0)
    if len(pairs) > 1:
        is_held_out = held_out(targets, ids, validation_fraction, seed, ranks)
        fit, held = prepare(train[~is_held_out], train[is_held_out], True, ranks)
        batches = _Batches(fit * scale, targets[~is_held_out], ids[~is_held_out], batch_size, seed, ranks)
        heads = _Heads(pairs, train.shape[1], len(classes), train.device)
        for kept, part in rungs:
            heads = heads.best(max(1, round(kept * len(pairs))), scores)
            length = max(1, round(part * epochs))
            heads.train(batches, length)
            found = heads.scores(held * scale, targets[is_held_out], ranks)
            for pair, score in zip(heads.pairs, found, strict=True):
                scores[pair], lengths[pair] = score, lengths[pair] + length
        best = heads.best(1, scores).pairs[0]
    else:
        best = pairs[0]

    fit, test = prepare(train, test, True, ranks)
    final = _Heads([best], train.shape[1], len(classes), train.device)
    final.train(_Batches(fit * scale, targets, ids, batch_size, seed, ranks), epochs)
    predictions = classes[final.logits(test * scale)[:, 0].argmax(dim=1)]
    accuracy = share(predictions == test_labels, ranks)
    validation = {pair: score[0] for pair, score in scores.items()}
    return HeadsResult(accuracy, *best, validation, lengths, predictions)


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
        self._batch_size = batch_size or min(max(len(self._used) // 50, 16), 1024)
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
        pairs: list[Pair],
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

    def best(self, count: int, scores: dict[Pair, tuple[float, float]]) -> "_Heads":
        """The `count` heads of the largest scores; of equal ones the larger decay."""
        if count >= len(self.pairs):
            return self
        pairs = self.pairs
        order = sorted(range(len(pairs)), key=lambda i: (*scores[pairs[i]], pairs[i][1]), reverse=True)[
            :count
        ]
        chosen = [pairs[i] for i in order]
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

    def scores(self, features: Tensor, targets: Tensor, ranks: Ranks) -> list[tuple[float, float]]:
        """Accuracy of each head over all ranks' samples and, to tell equal ones apart, its log likelihood;
        a head that diverged has 0 and -infinity.
        """
        log_p = self.logits(features).double().log_softmax(dim=2)
        hits = (log_p.argmax(dim=2) == targets[:, None]).double().sum(dim=0)
        likelihood = log_p.gather(2, targets[:, None, None].expand(-1, log_p.shape[1], 1)).sum(dim=(0, 2))
        count = hits.new_tensor([len(targets)])
        *sums, total = ranks.sum(torch.cat([hits, likelihood, count])).tolist()
        both = zip(sums[: len(self.pairs)], sums[len(self.pairs) :], strict=True)
        return [(h / total, p / total) if math.isfinite(p) else (0.0, -math.inf) for h, p in both]
