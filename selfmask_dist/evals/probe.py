"""Linear probe: multinomial logistic regression on fixed embeddings, which ranks may share.

    min over V, b of  1/n sum_i CE(V x_i + b, y_i) + l2/2 |V|^2

A convex problem, solved by L-BFGS with the gradient written out, so the result depends on the data and `seed`
(the validation split) alone. scikit-learn's LogisticRegression is the same problem with C = 1 / (n * l2). For
many learning rates and strengths at a time, by SGD, see `probe_heads`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from selfmask_dist.evals.embeddings import Embeddings
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


@dataclass(frozen=True)
class ProbeResult:
    """What a probe found.

    Attributes:
        accuracy: on the test part, in [0, 1].
        l2: the strength used.
        validation: accuracy on the held-out part of the training set by strength; empty with one strength.
        is_converged: False where the final solution stopped at `max_iterations`.
        predictions: (this rank's test samples,) int64 class ids.
        log_probabilities: (this rank's test samples, classes) of the ids in `classes`.
        classes: (classes,) int64, the training labels that occur, in order.
    """

    accuracy: float
    l2: float
    validation: dict[float, float]
    is_converged: bool
    predictions: Tensor
    log_probabilities: Tensor
    classes: Tensor


def linear_probe(
    train: Embeddings,
    test: Embeddings,
    *,
    l2: Sequence[float] = L2_GRID,
    standardize: bool = True,
    seed: int = 0,
    max_iterations: int = 5000,
    ranks: Ranks | None = None,
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

    Raises:
        ValueError: on every rank alike: features that are not finite, fewer than two classes, or nothing to
            hold out.
    """
    ranks = ranks or Alone()
    if not l2 or min(l2) <= 0:
        raise ValueError(f"l2 must be strengths above 0, got {tuple(l2)}")
    classes = check_probe(train, test, ranks)
    targets = torch.searchsorted(classes, train.labels)
    features = train.features.double()

    validation: dict[float, float] = {}
    if len(l2) > 1:
        is_held_out = held_out(targets, train.ids, seed, ranks)
        fit, held = prepare(features[~is_held_out], features[is_held_out], standardize, ranks)
        solution: Tensor | None = None
        # from the easiest problem to the hardest, each from the last one's solution
        for strength in sorted(l2, reverse=True):
            solution, _ = _fit(
                fit, targets[~is_held_out], len(classes), strength, max_iterations, solution, ranks=ranks
            )
            hits = logits_of(held, solution).argmax(dim=1) == targets[is_held_out]
            validation[strength] = share(hits, ranks)
    best = max(validation, key=lambda strength: (validation[strength], strength)) if validation else l2[0]

    fit, queries = prepare(features, test.features.double(), standardize, ranks)
    solution, is_converged = _fit(fit, targets, len(classes), best, max_iterations, ranks=ranks)
    logits = logits_of(queries, solution)
    predictions = classes[logits.argmax(dim=1)]
    accuracy = share(predictions == test.labels, ranks)
    return ProbeResult(
        accuracy, best, validation, is_converged, predictions, logits.log_softmax(dim=1), classes
    )


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
    logits = torch.stack([member.log_probabilities for member in members]).mean(dim=0)
    return share(first.classes[logits.argmax(dim=1)] == test_labels, ranks or Alone())


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
    is_held_out = torch.zeros_like(everyone, dtype=torch.bool)
    for target in range(int(everyone.max()) + 1):
        members = order[everyone[order] == target]
        count = min(max(1, round(share * len(members))), len(members) - 1)
        is_held_out[members[: max(count, 0)]] = True
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
    sums = ranks.sum(torch.cat([fit.double().sum(dim=0), fit.new_full((1,), len(fit)).double()]))
    mean = sums[:-1] / sums[-1]
    deviation = (ranks.sum((fit.double() - mean).square().sum(dim=0)) / sums[-1]).sqrt()
    deviation = torch.where(deviation > 0, deviation, 1)  # a constant dimension says nothing: it becomes zero
    mean, deviation = mean.to(fit.dtype), deviation.to(fit.dtype)
    return (fit - mean) / deviation, (other - mean) / deviation


def logits_of(features: Tensor, solution: Tensor) -> Tensor:
    """Return logits (n, classes) of features (n, dim) by a solution (dim + 1, classes), the bias last."""
    return features @ solution[:-1] + solution[-1]


def _fit(
    features: Tensor,
    targets: Tensor,
    num_classes: int,
    l2: float,
    max_iterations: int,
    start: Tensor | None = None,
    *,
    ranks: Ranks | None = None,
) -> tuple[Tensor, bool]:
    """Solve the problem; returns (dim + 1, classes), the bias last, and whether it converged."""
    ranks = ranks or Alone()
    shape = (features.shape[1] + 1, num_classes)
    solution = features.new_zeros(shape) if start is None else start.clone()
    solution.grad = torch.zeros_like(solution)
    rows = torch.arange(len(features), device=features.device)
    num_samples = float(ranks.sum(features.new_tensor([len(features)])))
    optimizer = torch.optim.LBFGS(
        [solution],
        max_iter=max_iterations,
        history_size=20,
        tolerance_grad=_TOLERANCE,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def loss_and_gradient() -> float:
        log_p = logits_of(features, solution).log_softmax(dim=1)
        loss = -log_p[rows, targets].sum(dim=0, keepdim=True)
        residual = log_p.exp()
        residual[rows, targets] -= 1
        # one sum over ranks, after which all of them take the same step
        parts = [(features.T @ residual).flatten(), residual.sum(dim=0), loss]
        summed = ranks.sum(torch.cat(parts)) / num_samples
        gradient = summed[:-1].view(shape)
        gradient[:-1] += l2 * solution[:-1]
        solution.grad = gradient
        return float(summed[-1] + 0.5 * l2 * solution[:-1].square().sum())

    optimizer.step(loss_and_gradient)
    loss_and_gradient()  # the optimizer leaves the gradient of its last trial
    assert solution.grad is not None
    return solution.detach(), bool(solution.grad.abs().max() <= _GOOD_ENOUGH)
