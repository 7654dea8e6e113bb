"""Linear probe: multinomial logistic regression on fixed embeddings.

    min over V, b of  1/n sum_i CE(V x_i + b, y_i) + l2/2 |V|^2

A convex problem, solved by L-BFGS with the gradient written out, so the result depends on the data and `seed`
(the validation split) alone. scikit-learn's LogisticRegression is the same problem with C = 1 / (n * l2).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from selfmask_dist.evals.checks import check_features, check_labels

L2_GRID = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
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
        predictions: (test samples,) int64 class ids.
    """

    accuracy: float
    l2: float
    validation: dict[float, float]
    is_converged: bool
    predictions: Tensor


def linear_probe(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    l2: Sequence[float] = L2_GRID,
    standardize: bool = True,
    validation_fraction: float = 0.2,
    seed: int = 0,
    max_iterations: int = 500,
    dtype: torch.dtype = torch.float64,
) -> ProbeResult:
    """Train a linear classifier on embeddings and test it; the regularisation is chosen on held-out data.

    Args:
        train, test: (samples, dim) embeddings, any float type, on one device.
        train_labels, test_labels: (samples,) class ids; need not be consecutive.
        l2: strengths to choose from. With one there is no validation split.
        standardize: give each dimension mean 0 and deviation 1 over the training samples, so that `l2` means
            the same for every backbone.
        validation_fraction: held out of each class to choose the strength; the final fit uses all samples.
        seed: of the validation split.
        max_iterations: of L-BFGS, for each fit.
        dtype: of the computation; float32 halves its memory.

    Raises:
        ValueError: features that are not finite, fewer than two classes, or nothing to hold out.
    """
    check_features("train", train)
    check_features("test", test)
    check_labels("train_labels", train_labels, len(train))
    check_labels("test_labels", test_labels, len(test))
    if train.shape[1] != test.shape[1]:
        raise ValueError(f"train has {train.shape[1]} dimensions and test has {test.shape[1]}")
    if not l2 or min(l2) <= 0:
        raise ValueError(f"l2 must be strengths above 0, got {tuple(l2)}")
    classes, targets = train_labels.unique(return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"a probe needs at least two classes; every training label is {int(classes[0])}")
    train, test = train.to(dtype), test.to(dtype)

    validation: dict[float, float] = {}
    if len(l2) > 1:
        is_held_out = _held_out(targets, validation_fraction, seed)
        fit, held_out = _prepare(train[~is_held_out], train[is_held_out], standardize)
        solution: Tensor | None = None
        for strength in sorted(
            l2, reverse=True
        ):  # from the easiest problem to the hardest, each from the last one's solution
            solution, _ = _fit(fit, targets[~is_held_out], len(classes), strength, max_iterations, solution)
            hits = _logits(held_out, solution).argmax(dim=1) == targets[is_held_out]
            validation[strength] = float(hits.double().mean())
    best = max(validation, key=lambda strength: (validation[strength], strength)) if validation else l2[0]

    fit, test = _prepare(train, test, standardize)
    solution, is_converged = _fit(fit, targets, len(classes), best, max_iterations)
    predictions = classes[_logits(test, solution).argmax(dim=1)]
    accuracy = float((predictions == test_labels).double().mean())
    return ProbeResult(accuracy, best, validation, is_converged, predictions)


def _held_out(targets: Tensor, fraction: float, seed: int) -> Tensor:
    """Bool (samples,): of each class with at least two samples that fraction, at least one and never all."""
    if not 0 < fraction < 1:
        raise ValueError(f"validation_fraction must be between 0 and 1, got {fraction}")
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed)).to(targets.device)
    is_held_out = torch.zeros_like(targets, dtype=torch.bool)
    for target in range(int(targets.max()) + 1):
        members = order[targets[order] == target]
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        is_held_out[members[:count]] = True
    if not is_held_out.any():
        raise ValueError(
            "every class has a single training sample, so none can be held out to choose l2; give a single l2"
        )
    return is_held_out


def _prepare(fit: Tensor, other: Tensor, standardize: bool) -> tuple[Tensor, Tensor]:
    if not standardize:
        return fit, other
    deviation, mean = torch.std_mean(fit, dim=0, correction=0)
    deviation = torch.where(deviation > 0, deviation, 1)  # a constant dimension says nothing: it becomes zero
    return (fit - mean) / deviation, (other - mean) / deviation


def _logits(features: Tensor, solution: Tensor) -> Tensor:
    return features @ solution[:-1] + solution[-1]


def _fit(
    features: Tensor,
    targets: Tensor,
    num_classes: int,
    l2: float,
    max_iterations: int,
    start: Tensor | None = None,
) -> tuple[Tensor, bool]:
    """Solve the problem; returns (dim + 1, classes), the bias last, and whether it converged."""
    shape = (features.shape[1] + 1, num_classes)
    solution = features.new_zeros(shape) if start is None else start.clone()
    solution.grad = torch.zeros_like(solution)
    rows = torch.arange(len(features), device=features.device)
    optimizer = torch.optim.LBFGS(
        [solution],
        max_iter=max_iterations,
        history_size=20,
        tolerance_grad=_TOLERANCE,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def loss_and_gradient() -> float:
        log_p = _logits(features, solution).log_softmax(dim=1)
        loss = -log_p[rows, targets].mean() + 0.5 * l2 * solution[:-1].square().sum()
        residual = log_p.exp()
        residual[rows, targets] -= 1
        residual /= len(features)
        solution.grad = torch.cat(
            [features.T @ residual + l2 * solution[:-1], residual.sum(dim=0, keepdim=True)]
        )
        return float(loss)

    optimizer.step(loss_and_gradient)
    loss_and_gradient()  # the optimizer leaves the gradient of its last trial
    assert solution.grad is not None
    return solution.detach(), bool(solution.grad.abs().max() <= _GOOD_ENOUGH)
