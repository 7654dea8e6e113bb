"""Zero-shot: an image belongs to the class whose text embedding is nearest."""

import torch.nn.functional as F
from torch import Tensor

from selfmask_dist.evals.checks import check_features, check_labels
from selfmask_dist.evals.ranks import Alone, Ranks, raise_together, share


def zero_shot(
    features: Tensor, labels: Tensor, text: Tensor, *, top: int = 5, ranks: Ranks | None = None
) -> tuple[float, float]:
    """Accuracy of the nearest class, and how often the right one is among the `top` nearest (or among all,
    where there are fewer). Collective if `ranks` is.

    Args:
        features: (n, dim), labels (n,): this rank's images. text: (classes, dim), class c in row c.

    Raises:
        ValueError: on every rank alike: features or labels that cannot be used, or text of another dimension.
    """
    ranks = ranks or Alone()
    complaint = None
    try:
        if len(features) or ranks.size == 1:
            check_features("features", features)
            check_labels("labels", labels, len(features), len(text))
        if text.shape[1] != features.shape[1]:
            raise ValueError(f"images have {features.shape[1]} dimensions and texts have {text.shape[1]}")
    except ValueError as error:
        complaint = str(error)
    raise_together(complaint, ranks, features.device)
    logits = F.normalize(features.float()) @ F.normalize(text.float().to(features.device)).T
    nearest = logits.topk(min(top, len(text)), dim=1).indices
    hits = nearest == labels[:, None]
    return share(hits[:, 0], ranks), share(hits.any(dim=1), ranks)
