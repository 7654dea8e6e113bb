"""Label maps: mean IoU of logits for each pixel, and a linear probe on frozen patches.

The probe is the convex problem

    min  1/n sum_p sum_c  - q_pc log softmax(V x_p + b)_c + l2/2 |V|^2

over all patches p that hold a counted pixel, with q_pc the share of class c in it, solved by L-BFGS. Its
logits are enlarged as a trained head's are.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from selfmask_dist.data import Batch
from selfmask_dist.data.targets import IGNORED
from selfmask_dist.evals.embed import eval_mode
from selfmask_dist.evals.probe import Rows, logits_of, statistics_of
from selfmask_dist.evals.ranks import Ranks
from selfmask_dist.evals.targets.metrics import confusion, mean_iou
from selfmask_dist.evals.targets.probe import minimise
from selfmask_dist.objectives.targets.dense import enlarged

MOST_PATCHES = 2**18  # that a probe is fitted on, over all ranks
L2 = 1e-3
_ITERATIONS = 100
Encode = Callable[[Tensor], Tensor]


@torch.no_grad()
def measure_maps(
    predict_fn: Encode, batches: Iterable[Batch], num_classes: int, ranks: Ranks, device: torch.device
) -> float:
    """Return the mean IoU over the pixels of all ranks' batches. Collective: every rank must call.

    Args:
        predict_fn: images (n, 3, H, W) -> logits (n, classes, H, W).
        batches: this rank's, with label maps as targets; rows of weight 0 do not count.
    """
    counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
    for batch in batches:
        assert batch.targets is not None
        is_real = batch.weights > 0
        found = predict_fn(batch.views[0].to(device)).argmax(dim=1)
        counts += confusion(found[is_real.to(device)], batch.targets[is_real].to(device), num_classes)
    return mean_iou(ranks.sum(counts))


def probe_patches(
    encoder: torch.nn.Module,
    train: Iterable[Batch],
    test: Iterable[Batch],
    num_classes: int,
    ranks: Ranks,
    device: torch.device,
    on_step: Callable[[], None] = lambda: None,
) -> float:
    """Return the mean IoU on the test part of a linear probe on frozen patches. Collective.

    Args:
        encoder: images (n, 3, H, W) -> (n, rows, columns, dim).
        train, test: this rank's batches, with label maps as targets.
        on_step: called in each step of the fit, on all ranks equally often.
    """
    with eval_mode(encoder):
        found = list(_patches(encoder, train, num_classes, device))
        features, shares = (torch.cat(part) for part in zip(*found, strict=True))
        statistics = statistics_of(features, None, ranks)

        def add(logits: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
            return -(wanted * logits.log_softmax(dim=1)).sum(), logits.softmax(dim=1) - wanted

        rows = Rows(features, None, statistics)
        solution = minimise(rows, shares.double(), num_classes, L2, add, _ITERATIONS, ranks, on_step)
        mean, deviation = statistics

        def predict(images: Tensor) -> Tensor:
            found = encoder(images)
            logits = logits_of((found.double() - mean) / deviation, solution)
            return enlarged(logits, (images.shape[-2], images.shape[-1]))

        return measure_maps(predict, test, num_classes, ranks, device)


def num_images_for(patches: int) -> int:
    """Return how many training images a probe takes that have so many patches each."""
    return max(MOST_PATCHES // patches, 1)


def class_shares(labels: Tensor, grid: tuple[int, int], num_classes: int) -> Tensor:
    """Return the share of each class among the counted pixels of each patch, (n, rows, columns, classes).

    A patch of which no pixel counts has zeros.

    Args:
        labels: (n, H, W) int64. grid: rows and columns of patches.
    """
    is_counted = labels != IGNORED
    one_hot = F.one_hot(labels.where(is_counted, 0), num_classes).float() * is_counted[..., None]
    sums = F.adaptive_avg_pool2d(one_hot.permute(0, 3, 1, 2), grid).permute(0, 2, 3, 1)
    return sums / sums.sum(dim=-1, keepdim=True).clamp(min=1e-12)


@torch.no_grad()
def _patches(
    encoder: Encode, batches: Iterable[Batch], num_classes: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the patches (m, dim) of each batch that count, and their classes' shares (m, classes)."""
    for batch in batches:
        assert batch.targets is not None
        is_real = (batch.weights > 0).to(device)
        found = encoder(batch.views[0].to(device))[is_real].float()
        labels = batch.targets.to(device)[is_real]
        shares = class_shares(labels, (found.shape[1], found.shape[2]), num_classes)
        chosen = shares.sum(dim=-1) > 0
        yield found[chosen], shares[chosen]
