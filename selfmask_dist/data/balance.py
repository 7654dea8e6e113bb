"""Balanced sampling: an epoch in which each class comes as often as any other, whatever the data's shares are.

An epoch has as many places as there are samples. Place p is of class c = classes[shuffled[p] mod C] and takes
that class's samples in turn, in an order that each round through them shuffles anew:

    order[p] = perm_{c, r}[k],     r, k = divmod(the number of earlier places of class c, samples of class c)

so a rare class's samples come several times before any of a common class comes twice. It is a function of
(labels, seed, epoch) alone, and so the same on any number of ranks, and after a resume.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from selfmask_dist.data.order import Ids, balance_generator


def balanced_order(labels: npt.NDArray[np.int64], *, seed: int, epoch: int) -> Ids:
    """Return the samples of an epoch, (samples,) int64: 8 bytes a sample.

    Args:
        labels: (samples,), each 0 or above; classes without a sample are passed over.

    Raises:
        ValueError: a sample has no label.
    """
    if len(labels) and labels.min() < 0:
        raise ValueError("data.sampling=balanced needs a label of every training image")
    classes, of_class, counts = np.unique(labels, return_inverse=True, return_counts=True)
    rng = balance_generator(seed=seed, epoch=epoch)
    # each class's number of places differs by at most one from any other's; which ones have one more is drawn
    ranks = np.argsort(rng.random(len(classes)), kind="stable")
    places = ranks[np.argsort(rng.random(len(labels)), kind="stable") % max(len(classes), 1)]
    members = np.argsort(of_class, kind="stable")
    ends = np.cumsum(counts)
    found = np.empty(len(labels), dtype=np.int64)
    for number, (end, count) in enumerate(zip(ends.tolist(), counts.tolist(), strict=True)):
        own = np.flatnonzero(places == number)
        rounds = -(-len(own) // count)
        drawn = rng.random((rounds, count))
        turns = np.argsort(drawn, axis=1, kind="stable").ravel()[: len(own)]
        found[own] = members[end - count : end][turns]
    return found


class BalancedOrder:
    """The balanced order of one epoch; see `balanced_order`. Indexed as `order.EpochOrder`."""

    def __init__(self, labels: npt.NDArray[np.int64], *, seed: int, epoch: int) -> None:
        self._order = balanced_order(labels, seed=seed, epoch=epoch)

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, places: Ids) -> Ids:
        found: Ids = self._order[places]
        return found
