"""Several masks of one backbone as one model: the mean of their embeddings, or of their probes' logits."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from selfmask_dist.evals.probe import ProbeResult
from selfmask_dist.evals.ranks import Alone, Ranks, share


def mean_embedding(members: Sequence[Tensor]) -> Tensor:
    """The mean of the unit vectors of embeddings (n, dim) of the same samples.

    Raises:
        ValueError: they differ in shape.
    """
    shapes = {tuple(member.shape) for member in members}
    if len(shapes) != 1:
        raise ValueError(f"an ensemble is of embeddings of one shape, got {sorted(shapes)}")
    return torch.stack([F.normalize(member.float()) for member in members]).mean(dim=0)


def mean_logits_accuracy(
    members: Sequence[ProbeResult], test_labels: Tensor, ranks: Ranks | None = None
) -> float:
    """Accuracy of the mean of the probes' logits, on the test samples that all of them predicted. Log
    probabilities stand for logits: a sample's constant does not move its largest. Collective if `ranks` is.

    Raises:
        ValueError: the probes are of different classes.
    """
    first = members[0]
    if any(not torch.equal(first.classes, member.classes) for member in members):
        raise ValueError("the mean of logits needs probes of the same classes")
    logits = torch.stack([member.log_probabilities for member in members]).mean(dim=0)
    return share(first.classes[logits.argmax(dim=1)] == test_labels, ranks or Alone())
