"""What every evaluation asks of its embeddings, so that a mistake is named before it becomes an accuracy."""

import torch
from torch import Tensor


def check_features(name: str, features: Tensor) -> None:
    """Raise ValueError unless `features` is a non-empty (samples, dim) matrix of finite numbers."""
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(
            f"{name} must be a non-empty matrix (samples, dim), got shape {tuple(features.shape)}"
        )
    if not features.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {features.dtype}")
    if features.sum(
        dtype=torch.float32
    ).isfinite():  # a fiftieth of the time, and no number is hidden in a sum
        return
    rows = (~torch.isfinite(features)).any(dim=1).nonzero().flatten()
    if len(rows):
        raise ValueError(
            f"{name}: {len(rows)} of {len(features)} rows hold NaN or infinity, the first at {int(rows[0])}; "
            "look at the images or the training that made them"
        )


def check_labels(name: str, labels: Tensor, num_samples: int, num_classes: int | None = None) -> None:
    """Raise ValueError unless `labels` holds one class id in [0, num_classes) for each sample."""
    if labels.shape != (num_samples,):
        raise ValueError(
            f"{name} must have shape ({num_samples},) to match the features, got {tuple(labels.shape)}"
        )
    if labels.is_floating_point():
        raise ValueError(f"{name} must be integers, got {labels.dtype}")
    low, high = int(labels.min()), int(labels.max())
    if low < 0:
        raise ValueError(f"{name} hold {low}: leave out the samples without a label")
    if num_classes is not None and high >= num_classes:
        raise ValueError(f"{name} hold {high}, but num_classes is {num_classes}")
