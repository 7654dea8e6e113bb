"""Mean average precision, R2 with mean absolute error, mean intersection over union.

    mAP    mean over classes c of  sum_n (R_n - R_(n-1)) P_n      by falling score, scikit-learn's
    R2     mean over quantities of  1 - sum (y - z)^2 / sum (y - mean y)^2
    MAE    mean over quantities and samples of |y - z|
    mIoU   mean over classes c of  TP_c / (TP_c + FP_c + FN_c),  over pixels of all pictures together

They equal torchmetrics'. A class that nothing is of has no value, and is left out of the mean.
"""

import numpy as np
import torch
from torch import Tensor

from selfmask_dist.data.targets import IGNORED
from selfmask_dist.evals.ranks import Ranks, largest


def gather_rows(rows: Tensor, ids: Tensor, ranks: Ranks) -> Tensor:
    """Return the rows (n, width) of all ranks in the order of their ids, float64. Collective.

    Each id 0, 1, ... is of one rank.
    """
    length = largest(int(ids.max()) + 1 if len(ids) else 0, ranks, ids.device)
    table = torch.zeros(length, rows.shape[1], dtype=torch.float64, device=rows.device)
    table[ids] = rows.double()
    return ranks.sum(table)


def mean_average_precision(scores: Tensor, targets: Tensor) -> float:
    """Return the mean over classes of the average precision.

    Args:
        scores: (n, classes), larger for a likelier class. targets: (n, classes) of 0 and 1.

    Raises:
        ValueError: no sample is of any class.
    """
    from sklearn.metrics import average_precision_score  # type: ignore[import-untyped]

    is_there = (targets > 0.5).any(dim=0)
    if not is_there.any():
        raise ValueError("no test image has any label, so that there is no average precision")
    chosen = is_there.nonzero().flatten().tolist()
    values = [
        average_precision_score(targets[:, c].cpu().numpy(), scores[:, c].cpu().numpy()) for c in chosen
    ]
    return float(np.mean(values))


def regression_scores(answers: Tensor, targets: Tensor) -> dict[str, float]:
    """Return `r2` and `mae` of answers (n, quantities) to targets of the same shape.

    Raises:
        ValueError: fewer than two samples, of which R2 is not defined.
    """
    from sklearn.metrics import mean_absolute_error, r2_score

    if len(targets) < 2:
        raise ValueError(f"R2 needs two test images, and there are {len(targets)}")
    truth, found = targets.cpu().numpy(), answers.cpu().numpy()
    return {"r2": float(r2_score(truth, found)), "mae": float(mean_absolute_error(truth, found))}


def confusion(found: Tensor, targets: Tensor, num_classes: int) -> Tensor:
    """Return how many counted pixels of class i were told as j, int64 (classes, classes).

    Args:
        found, targets: class numbers of any one shape; a target of `IGNORED` does not count.
    """
    is_counted = targets != IGNORED
    pairs = targets[is_counted] * num_classes + found[is_counted]
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def mean_iou(counts: Tensor) -> float:
    """Return the mean over classes of intersection over union, of what `confusion` counted.

    Raises:
        ValueError: no pixel was counted.
    """
    hits, union = counts.diagonal(), counts.sum(dim=0) + counts.sum(dim=1) - counts.diagonal()
    if not union.any():
        raise ValueError("no pixel of the test images' label maps counts, so that there is no IoU")
    is_there = union > 0
    return float((hits[is_there].double() / union[is_there]).mean())
