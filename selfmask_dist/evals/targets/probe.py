"""Linear probes of several labels and of numbers, on fixed embeddings that ranks may share.

    multilabel   min  1/n sum_i sum_c BCE(v_c x_i + b_c, y_ic) + l2/2 |V|^2          by L-BFGS
    regression   min  1/2n sum_i |V x_i + b - y_i|^2 + l2/2 |V|^2                    solved exactly

of standardised x (and y, for a regression). scikit-learn's LogisticRegression for each class is the first
with
C = 1 / (n l2), its Ridge the second with alpha = n l2. The strength is chosen on a fifth of the training
samples.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from selfmask_dist.data import TargetKind
from selfmask_dist.evals.embeddings import Embeddings
from selfmask_dist.evals.probe import L2_GRID, Rows, held_out, logits_of, statistics_of
from selfmask_dist.evals.ranks import Alone, Ranks, raise_together
from selfmask_dist.evals.targets.metrics import gather_rows, mean_average_precision, regression_scores

_HISTORY = 20
_TOLERANCE = 1e-7
# gets the gradient, this rank's share of the loss
Loss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class TargetProbe:
    """What a probe found.

    scores: of the test samples, by metric's name. l2: the strength used. validation: by strength.
    outputs: (this rank's test samples, outputs): logits, or numbers in their own units.
    """

    scores: dict[str, float]
    l2: float
    validation: dict[float, float]
    outputs: Tensor


def probe_targets(
    kind: TargetKind,
    train: tuple[Embeddings, Tensor],
    test: tuple[Embeddings, Tensor],
    *,
    l2: Sequence[float] = L2_GRID,
    seed: int = 0,
    max_iterations: int = 1000,
    ranks: Ranks | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> TargetProbe:
    """Fit a linear head of targets on training embeddings and test it. Collective if `ranks` is.

    Args:
        kind: multilabel or regression.
        train, test: this rank's embeddings and their targets (n, outputs).
        seed: of the samples that strengths are chosen on.
        max_iterations: of L-BFGS, for each fit.
        on_step: called in each of its steps, on all ranks equally often.

    Raises:
        ValueError: on every rank alike: features that are not finite.
    """
    ranks = ranks or Alone()
    (bank, targets), (queries, truth) = train, test
    device = bank.features.device
    is_finite = bool(bank.features.isfinite().all()) and bool(queries.features.isfinite().all())
    raise_together(None if is_finite else "embeddings hold NaN or infinity", ranks, device)
    targets, truth = targets.double(), truth.double()

    def fit(places: Tensor | None, strength: float) -> Callable[[Rows], Tensor]:
        rows = Rows(bank.features, places, statistics_of(bank.features, places, ranks))
        chosen = targets if places is None else targets[places]
        if kind == "regression":
            return _fit_numbers(rows, chosen, strength, ranks)
        return _fit_labels(rows, chosen, strength, max_iterations, ranks, on_step)

    validation: dict[float, float] = {}
    if len(l2) > 1:
        nothing = torch.zeros(len(bank.ids), dtype=torch.int64, device=device)
        is_held = held_out(nothing, bank.ids, seed, ranks)
        held, others = is_held.nonzero().flatten(), (~is_held).nonzero().flatten()
        statistics = statistics_of(bank.features, others, ranks)
        rows = Rows(bank.features, held, statistics)
        for strength in sorted(l2, reverse=True):
            found = fit(others, strength)(rows)
            validation[strength] = _first_score(kind, found, targets[held], bank.ids[held], ranks)
    best = max(validation, key=lambda one: (validation[one], one)) if validation else l2[0]
    answer = fit(None, best)
    outputs = answer(Rows(queries.features, None, statistics_of(bank.features, None, ranks)))
    scores = scores_of(kind, outputs, truth, queries.ids, ranks)
    return TargetProbe(scores, best, validation, outputs)


def scores_of(
    kind: TargetKind, outputs: Tensor, targets: Tensor, ids: Tensor, ranks: Ranks
) -> dict[str, float]:
    """Return the metrics of outputs to targets, (n, outputs) of this rank's samples `ids`. Collective."""
    found, truth = (gather_rows(rows, ids, ranks) for rows in (outputs, targets))
    if kind == "regression":
        return regression_scores(found, truth)
    return {"map": mean_average_precision(found, truth)}


def _first_score(kind: TargetKind, outputs: Tensor, targets: Tensor, ids: Tensor, ranks: Ranks) -> float:
    """Return the score that strengths are chosen by, on samples that are a part of all."""
    marked = torch.cat((outputs, targets, torch.ones_like(outputs[:, :1])), dim=1)
    rows = gather_rows(marked, ids, ranks)
    rows = rows[rows[:, -1] > 0]
    found, truth = rows[:, :-1].chunk(2, dim=1)
    if kind == "regression":
        return regression_scores(found, truth)["r2"] if len(truth) > 1 else 0.0
    return mean_average_precision(found, truth) if (truth > 0).any() else 0.0


def _fit_labels(
    rows: Rows,
    targets: Tensor,
    l2: float,
    max_iterations: int,
    ranks: Ranks,
    on_step: Callable[[], None],
) -> Callable[[Rows], Tensor]:
    """Solve one logistic regression for each class, all at once; return rows -> logits (n, classes)."""

    def add(logits: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        loss = F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum")
        return loss, torch.sigmoid(logits) - wanted

    solution = minimise(rows, targets, targets.shape[1], l2, add, max_iterations, ranks, on_step)
    return lambda others: _outputs(others, solution)


def minimise(
    rows: Rows,
    targets: Tensor,
    num_outputs: int,
    l2: float,
    loss_fn: Loss,
    max_iterations: int,
    ranks: Ranks,
    on_step: Callable[[], None] = lambda: None,
) -> Tensor:
    """Return the solution (dim + 1, outputs) of 1/n sum_i loss(logits_i, target_i) + l2/2 |V|^2, the bias
    last. Collective: every rank must call.

    Args:
        targets: one row for each of `rows`.
        loss_fn: logits (m, outputs) and targets -> the loss's sum, and its gradient by the logits.
    """
    solution = torch.zeros(rows.dim + 1, num_outputs, dtype=torch.float64, device=rows.device)
    solution.grad = torch.zeros_like(solution)
    total = float(ranks.sum(solution.new_tensor([len(rows)])))
    optimizer = torch.optim.LBFGS(
        [solution],
        max_iter=max_iterations,
        history_size=_HISTORY,
        tolerance_grad=_TOLERANCE,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    @torch.no_grad()
    def closure() -> float:
        on_step()
        loss, gradient = solution.new_zeros(1), torch.zeros_like(solution)
        for part in rows.parts(num_outputs):
            features = rows[part]
            added, slope = loss_fn(logits_of(features, solution), targets[part])
            loss += added
            gradient[:-1] += features.T @ slope
            gradient[-1] += slope.sum(dim=0)
        flat = ranks.sum(torch.cat((loss, gradient.flatten()))) / total
        assert solution.grad is not None
        solution.grad.copy_(flat[1:].view_as(solution))
        solution.grad[:-1] += l2 * solution[:-1]
        return float(flat[0] + l2 / 2 * solution[:-1].square().sum())

    optimizer.step(closure)
    return solution.detach()


def _fit_numbers(rows: Rows, targets: Tensor, l2: float, ranks: Ranks) -> Callable[[Rows], Tensor]:
    """Solve the ridge regression; return rows -> numbers (n, quantities) in their own units."""
    mean, deviation = statistics_of(targets, None, ranks)
    wanted = (targets - mean) / deviation
    dim = rows.dim
    sums = torch.zeros(dim, dim + targets.shape[1], dtype=torch.float64, device=rows.device)
    for part in rows.parts(targets.shape[1]):
        features = rows[part]
        sums += features.T @ torch.cat((features, wanted[part]), dim=1)
    total = float(ranks.sum(sums.new_tensor([len(rows)])))
    sums = ranks.sum(sums) / total
    # features and numbers have mean 0, and so has the bias
    weight = torch.linalg.solve(
        sums[:, :dim] + l2 * torch.eye(dim, dtype=sums.dtype, device=sums.device), sums[:, dim:]
    )
    solution = torch.cat((weight, weight.new_zeros(1, weight.shape[1])))
    return lambda others: _outputs(others, solution) * deviation + mean


def _outputs(rows: Rows, solution: Tensor) -> Tensor:
    found = [logits_of(rows[part], solution) for part in rows.parts(solution.shape[1])]
    return torch.cat(found) if found else solution.new_zeros(0, solution.shape[1])
