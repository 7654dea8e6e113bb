"""Low-shot: a linear probe on a small, class-balanced share of the training labels (paper, figure 3).

    n = floor(share * samples / classes) labels of each class, drawn anew for each try

The authors draw the same number from every class, as here, and fit a logistic regression; images without
a label may be used, so features are standardised by the statistics of all training images. The strength is
fixed (scikit-learn's C): a handful of labels leaves none to choose it with.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from selfmask_dist.evals.embeddings import Embeddings
from selfmask_dist.evals.probe import linear_probe, prepare
from selfmask_dist.evals.ranks import Alone, Ranks, gather_labels

SHARES = (0.1, 0.04, 0.02, 0.01, 0.005, 0.0025)


@dataclass(frozen=True)
class LowShotResult:
    """What one share of the labels gives: labels per class (fewer where a class has fewer), and the accuracy
    of each try.
    """

    per_class: int
    accuracies: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean accuracy of the tries."""
        return statistics.mean(self.accuracies)

    @property
    def spread(self) -> float:
        """One standard deviation over the tries; 0 with a single one."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0


def low_shot(
    train: Embeddings,
    test: Embeddings,
    *,
    shares: Sequence[float] = SHARES,
    tries: int = 5,
    c: float = 1.0,
    seed: int = 0,
    ranks: Ranks | None = None,
) -> dict[float, LowShotResult]:
    """Return the accuracies by share of the labels; a share of less than one label per class is left out.
    Collective if `ranks` is: the result is the same on every rank, and under any number of ranks.

    Args:
        train, test: this rank's parts.
        c: strength of the regularisation as scikit-learn counts it, 1 / (labels * l2).
        seed: of the draws.

    Raises:
        ValueError: a share outside (0, 1], no try, `c` not above 0, or what `linear_probe` refuses.
    """
    ranks = ranks or Alone()
    if not c > 0:
        raise ValueError(f"low-shot takes a strength C above 0, got {c}")
    if not shares or min(shares) <= 0 or max(shares) > 1 or tries < 1:
        raise ValueError(f"low-shot takes shares above 0 and up to 1, and a try; got {shares} and {tries}")
    everyone = gather_labels(train.labels, train.ids, ranks).cpu()
    features, queries = prepare(train.features.double(), test.features.double(), True, ranks)
    train, test = replace(train, features=features), replace(test, features=queries)
    results = {}
    for share in shares:
        per_class = labels_per_class(everyone, share)
        if not per_class:
            continue
        accuracies = []
        for number in range(tries):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
            chosen = balanced_subset(everyone, per_class, generator).to(train.ids.device)
            result = linear_probe(
                train.where(chosen[train.ids]),
                test,
                l2=(1 / (c * int(chosen.sum())),),
                standardize=False,
                ranks=ranks,
            )
            accuracies.append(result.accuracy)
        results[share] = LowShotResult(per_class, tuple(accuracies))
    return results


def labels_per_class(labels: Tensor, share: float) -> int:
    """Return how many labels of each class `share` of the labels (n,) are; -1 stands for no label."""
    labels = labels[labels >= 0]
    return int(share * len(labels) / len(labels.unique()) + 1e-9)


def balanced_subset(labels: Tensor, per_class: int, generator: torch.Generator) -> Tensor:
    """Return which samples are drawn, bool (n,): `per_class` of each class, all where it has fewer."""
    chosen = torch.zeros_like(labels, dtype=torch.bool)
    order = torch.randperm(len(labels), generator=generator)
    for label in labels[labels >= 0].unique():
        chosen[order[labels[order] == label][:per_class]] = True
    return chosen
