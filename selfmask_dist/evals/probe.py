"""Linear probe: multinomial logistic regression on fixed embeddings, which ranks may share.

    min over V, b of  1/n sum_i CE(V x_i + b, y_i) + l2/2 |V|^2

A convex problem, solved by L-BFGS with the gradient written out, so the result depends on the data and `seed`
(the validation split) alone. scikit-learn's LogisticRegression is the same problem with C = 1 / (n * l2). For
many learning rates and strengths at a time, by SGD, see `probe_heads`.

Sums are float64. Rows are taken a chunk at a time, so that neither their logits nor a float64 copy of all
features exist; what fits into one chunk is computed as if there were no chunks, to the bit.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from selfmask_dist.evals.embeddings import Embeddings
from selfmask_dist.evals.memory import free_bytes
from selfmask_dist.evals.ranks import (
    Alone,
    Ranks,
    check_features,
    check_labels,
    gather_labels,
    largest,
    raise_together,
    share,
)

L2_GRID = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
HELD_OUT = 0.2  # share of each class's training samples that settings are chosen on
_TOLERANCE = 1e-6  # of the largest entry of the gradient
_GOOD_ENOUGH = 1e-4  # a solution that stopped above it has not converged
_HISTORY = 20  # steps of L-BFGS, of two vectors each
_CHUNK = 2**23  # logits, or features, at a time: 64 MiB in float64
_COPY_BYTES = 2**28  # features are standardised once where that takes no more, else in each step anew


@dataclass(frozen=True)
class ProbeResult:
    """What a probe found.

    Attributes:
        accuracy: on the test part, in [0, 1].
        l2: the strength used.
        validation: accuracy on the held-out part of the training set by strength; empty with one strength.
        is_converged: False where the final solution stopped at `max_iterations`.
        predictions: (this rank's test samples,) int64 class ids.
        classes: (classes,) int64, the training labels that occur, in order.
        queries, solution: this rank's test samples and what scores them, (dim + 1, classes).
    """

    accuracy: float
    l2: float
    validation: dict[float, float]
    is_converged: bool
    predictions: Tensor
    classes: Tensor
    queries: "Rows"
    solution: Tensor

    def log_probabilities(self, part: slice) -> Tensor:
        """Return the log probabilities (n, classes) of some test samples, of the ids in `classes`."""
        return logits_of(self.queries[part], self.solution).log_softmax(dim=1)


class Rows:
    """Features of some samples in float64, standardised where asked, made for a slice when it is asked for.

    Args:
        features: (n, dim) of any float type.
        places: which of them, int64; None for all.
        statistics: mean and deviation (dim,), float64; None leaves features as they are.
    """

    def __init__(
        self,
        features: Tensor,
        places: Tensor | None = None,
        statistics: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self._features, self._places, self._statistics = features, places, statistics
        self.dim = features.shape[1]
        self.device = features.device
        self._length = len(features) if places is None else len(places)
        self._copy = self._make(slice(None)) if self._length * self.dim * 8 <= _COPY_BYTES else None

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, part: slice) -> Tensor:
        return self._make(part) if self._copy is None else self._copy[part]

    def parts(self, width: int) -> Iterator[slice]:
        """Yield slices of so many rows that `width` numbers of each, or its features, make one chunk."""
        size = max(1, _CHUNK // max(width, self.dim))
        return (slice(start, start + size) for start in range(0, self._length, size))

    def _make(self, part: slice) -> Tensor:
        chosen = self._features[part] if self._places is None else self._features[self._places[part]]
        if self._statistics is None:
            return chosen.double()
        mean, deviation = self._statistics
        return (chosen.double() - mean) / deviation


def linear_probe(
    train: Embeddings,
    test: Embeddings,
    *,
    l2: Sequence[float] = L2_GRID,
    standardize: bool = True,
    seed: int = 0,
    max_iterations: int = 5000,
    ranks: Ranks | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> ProbeResult:
    """Train a linear classifier on embeddings and test it; the regularisation is chosen on held-out data.
    Collective if `ranks` is: every rank must call; the accuracies are the same on every rank.

    Args:
        train, test: this rank's parts, on one device; class ids need not be consecutive. The validation split
            is drawn by the ids of `train`; those of `test` are not looked at.
        l2: strengths to choose from, on a fifth of each class's training samples; the final fit uses all of
            them. With one strength there is no validation split.
        standardize: give each dimension mean 0 and deviation 1 over the training samples, so that `l2` means
            the same for every backbone.
        seed: of the validation split.
        max_iterations: of L-BFGS, for each fit.
        on_step: called in each of its steps, on all ranks equally often: a heartbeat, and a place to stop at.

    Raises:
        ValueError: on every rank alike: features that are not finite, fewer than two classes, nothing to hold
            out, or a problem that does not fit into a rank's memory.
    """
    ranks = ranks or Alone()
    if not l2 or min(l2) <= 0:
        raise ValueError(f"l2 must be strengths above 0, got {tuple(l2)}")
    classes = check_probe(train, test, ranks)
    targets = torch.searchsorted(classes, train.labels)
    device = train.features.device
    most_rows = max(len(train.features), len(test.features))
    room = _complaint(most_rows, train.features.shape[1], len(classes), free_bytes(device))
    raise_together(room, ranks, device)

    def fit(rows: Rows, targets: Tensor, strength: float, start: Tensor | None) -> tuple[Tensor, bool]:
        return _fit(
            rows, targets, len(classes), strength, max_iterations, start, ranks=ranks, on_step=on_step
        )

    validation: dict[float, float] = {}
    if len(l2) > 1:
        is_held_out = held_out(targets, train.ids, seed, ranks)
        chosen, others = (mask.nonzero().flatten() for mask in (is_held_out, ~is_held_out))
        statistics = statistics_of(train.features, others, ranks) if standardize else None
        rows, held = (Rows(train.features, places, statistics) for places in (others, chosen))
        solution: Tensor | None = None
        # from the easiest problem to the hardest, each from the last one's solution
        for strength in sorted(l2, reverse=True):
            solution, _ = fit(rows, targets[others], strength, solution)
            validation[strength] = share(_predict(held, solution) == targets[chosen], ranks)
        del rows, held
    best = max(validation, key=lambda strength: (validation[strength], strength)) if validation else l2[0]

    statistics = statistics_of(train.features, None, ranks) if standardize else None
    solution, is_converged = fit(Rows(train.features, None, statistics), targets, best, None)
    queries = Rows(test.features, None, statistics)
    predictions = classes[_predict(queries, solution)]
    accuracy = share(predictions == test.labels, ranks)
    return ProbeResult(accuracy, best, validation, is_converged, predictions, classes, queries, solution)


def mean_logits_accuracy(
    members: Sequence[ProbeResult], test_labels: Tensor, ranks: Ranks | None = None
) -> float:
    """Return the accuracy of the mean of the probes' logits, on the test samples that all of them predicted.
    Collective if `ranks` is.

    Log probabilities stand for logits: they differ by a constant of the sample, which does not move its
    largest.

    Raises:
        ValueError: the probes are of different classes.
    """
    first = members[0]
    if any(not torch.equal(first.classes, member.classes) for member in members):
        raise ValueError("the mean of logits needs probes of the same classes")
    found = [
        torch.stack([member.log_probabilities(part) for member in members]).mean(dim=0).argmax(dim=1)
        for part in first.queries.parts(len(first.classes) * len(members))
    ]
    places = torch.cat(found) if found else test_labels.new_zeros(0)
    return share(first.classes[places] == test_labels, ranks or Alone())


def _complaint(num_rows: int, dim: int, num_classes: int, free: int) -> str | None:
    """Return what is to be said where a fit of this rank's rows does not fit into `free` bytes."""
    matrices = 2 * _HISTORY + 8  # L-BFGS holds its history, and about eight vectors more
    # a chunk's logits are there four times; of features two copies may be made, of parts of the samples
    chunk = min(_CHUNK + num_classes, num_rows * max(num_classes, dim))
    copies = 2 * min(_COPY_BYTES, num_rows * dim * 8)
    needed = matrices * (dim + 1) * num_classes * 8 + 4 * 8 * chunk + copies
    if needed <= free:
        return None
    return (
        f"a linear probe of {dim} dimensions and {num_classes} classes needs {needed / 2**30:.1f} GiB on "
        f"each process ({matrices} float64 matrices of {dim + 1} x {num_classes}, and "
        f"{(4 * 8 * chunk + copies) / 2**30:.1f} GiB for a chunk of rows), and {free / 2**30:.1f} GiB are "
        f"free here. Set eval.probe=false, or use selfmask eval on a machine with more memory"
    )


def _predict(rows: Rows, solution: Tensor) -> Tensor:
    """Return the place of the largest logit of each row, int64 (n,)."""
    width = solution.shape[1]
    found = [logits_of(rows[part], solution).argmax(dim=1) for part in rows.parts(width)]
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64, device=rows.device)


def check_probe(train: Embeddings, test: Embeddings, ranks: Ranks) -> Tensor:
    """Return the class ids (classes,) that occur among all ranks' training labels, in order.

    Raises:
        ValueError: on every rank alike: what `linear_probe` cannot use.
    """
    complaint = None
    try:
        for name, part in (("train", train), ("test", test)):
            if len(part.features) or ranks.size == 1:  # a rank may have no samples
                check_features(name, part.features)
                check_labels(f"{name}_labels", part.labels, len(part.features))
        dim, test_dim = train.features.shape[1], test.features.shape[1]
        if dim != test_dim:
            raise ValueError(f"train has {dim} dimensions and test has {test_dim}")
    except ValueError as error:
        complaint = str(error)
    labels, device = train.labels, train.features.device
    raise_together(complaint, ranks, device)
    length = largest(int(labels.max()) + 1 if len(labels) else 0, ranks, device)
    counts = ranks.sum(torch.bincount(labels, minlength=length))
    classes = counts.nonzero().flatten()
    if not len(classes):
        raise ValueError("no rank has any training samples")
    if len(classes) < 2:
        raise ValueError(f"a probe needs at least two classes; every training label is {int(classes[0])}")
    return classes


def held_out(targets: Tensor, ids: Tensor, seed: int, ranks: Ranks, *, share: float = HELD_OUT) -> Tensor:
    """Return which samples choose between settings, bool (samples,): `share` of each class that has at
    least two, at least one of them and never all; the same samples under any number of ranks.
    """
    everyone = gather_labels(targets, ids, ranks)  # -1 where an id is not used
    order = torch.randperm(len(everyone), generator=torch.Generator().manual_seed(seed)).to(targets.device)
    order = order[everyone[order] >= 0]
    # one sort: the samples class by class, each class's in the order that was drawn
    order = order[everyone[order].argsort(stable=True)]
    sizes = torch.bincount(everyone[order])
    wanted = [max(min(max(1, round(share * size)), size - 1), 0) for size in sizes.tolist()]
    starts = sizes.cumsum(0) - sizes
    place = torch.arange(len(order), device=order.device) - starts.repeat_interleave(sizes)
    is_held_out = torch.zeros_like(everyone, dtype=torch.bool)
    is_held_out[order[place < sizes.new_tensor(wanted).repeat_interleave(sizes)]] = True
    if not is_held_out.any():
        raise ValueError(
            "every class has a single training sample, so none can be held out to choose by: give a probe a "
            "single l2, and anything else more images"
        )
    return is_held_out[ids]


def prepare(fit: Tensor, other: Tensor, standardize: bool, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Return both with mean 0 and deviation 1 in each dimension, by the statistics of all ranks' `fit`."""
    if not standardize:
        return fit, other
    mean, deviation = (part.to(fit.dtype) for part in statistics_of(fit, None, ranks))
    return (fit - mean) / deviation, (other - mean) / deviation


def statistics_of(features: Tensor, places: Tensor | None, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Return mean and deviation (dim,), float64, of all ranks' features (of those at `places`).

    A dimension that does not vary has a deviation of 1: it says nothing, and becomes zero.
    """
    rows = Rows(features, places)
    sums = torch.zeros(rows.dim + 1, dtype=torch.float64, device=rows.device)
    sums[-1] = len(rows)
    for part in rows.parts(1):
        sums[:-1] += rows[part].sum(dim=0)
    sums = ranks.sum(sums)
    mean = sums[:-1] / sums[-1]
    squares = torch.zeros_like(mean)
    for part in rows.parts(1):
        squares += (rows[part] - mean).square().sum(dim=0)
    deviation = (ranks.sum(squares) / sums[-1]).sqrt()
    return mean, torch.where(deviation > 0, deviation, 1)


def logits_of(features: Tensor, solution: Tensor) -> Tensor:
    """Return logits (n, classes) of features (n, dim) by a solution (dim + 1, classes), the bias last."""
    return features @ solution[:-1] + solution[-1]


def _fit(
    rows: Rows,
    targets: Tensor,
    num_classes: int,
    l2: float,
    max_iterations: int,
    start: Tensor | None = None,
    *,
    ranks: Ranks | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> tuple[Tensor, bool]:
    """Solve the problem; returns (dim + 1, classes), the bias last, and whether it converged."""
    ranks = ranks or Alone()
    shape = (rows.dim + 1, num_classes)
    if start is None:
        start = torch.zeros(shape, dtype=torch.float64, device=rows.device)
    solution = start.clone()
    solution.grad = torch.zeros_like(solution)
    num_samples = float(ranks.sum(solution.new_tensor([len(rows)])))
    optimizer = torch.optim.LBFGS(
        [solution],
        max_iter=max_iterations,
        history_size=_HISTORY,
        tolerance_grad=_TOLERANCE,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def loss_and_gradient() -> float:
        on_step()
        # one sum over ranks, after which all of them take the same step
        summed = ranks.sum(_sums(rows, targets, solution)) / num_samples
        gradient = summed[:-1].view(shape)
        gradient[:-1] += l2 * solution[:-1]
        solution.grad = gradient
        return float(summed[-1] + 0.5 * l2 * solution[:-1].square().sum())

    optimizer.step(loss_and_gradient)
    loss_and_gradient()  # the optimizer leaves the gradient of its last trial
    assert solution.grad is not None
    return solution.detach(), bool(solution.grad.abs().max() <= _GOOD_ENOUGH)


def _sums(rows: Rows, targets: Tensor, solution: Tensor) -> Tensor:
    """Return the gradient of the samples' summed loss, flat, and that loss as the last number."""
    flat = torch.zeros(solution.numel() + 1, dtype=solution.dtype, device=solution.device)
    gradient = flat[:-1].view_as(solution)
    for part in rows.parts(solution.shape[1]):
        features, labels = rows[part], targets[part]
        log_p = logits_of(features, solution).log_softmax(dim=1)
        numbers = torch.arange(len(features), device=rows.device)
        flat[-1] -= log_p[numbers, labels].sum()
        residual = log_p.exp_()
        residual[numbers, labels] -= 1
        gradient[:-1] += features.T @ residual
        gradient[-1] += residual.sum(dim=0)
    return flat
