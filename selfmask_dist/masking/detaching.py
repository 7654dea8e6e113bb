"""Masks off a model, also those whose handle is lost."""

from torch import nn

from selfmask_dist.masking import checks, marks


def detach(model: nn.Module, *, restore: bool = True) -> None:
    """Take every mask off a model, also those whose handle is lost; see `AttachedMasks.detach`.

    Args:
        restore: False leaves theta in place, as plain weights: also in a copy of a masked model, and where a
            mask file was applied.

    Raises:
        ValueError: the model carries no masks, or it is theta and its pretrained weights are not at hand.
    """
    found = list(dict.fromkeys(mark.masks for mark in marks.attached(model).values()))
    left_over = marks.left_over(model)
    if restore and left_over:
        raise ValueError(checks.describe_left_over(left_over))
    if any(hasattr(parameter, checks.MARK) for parameter in model.parameters()):
        raise ValueError("the masks on this model are parametrised (engine.name=deepspeed) and stay on it")
    if not found and not left_over:
        raise ValueError("this model carries no masks")
    for masks in reversed(found):
        masks.detach(restore=restore)
    marks.clear(model)
