"""Whether an optimizer can train masks, and whether it still does."""

from collections.abc import Sequence

from torch.optim import Optimizer

from selfmask_dist.masking.families import Family
from selfmask_dist.masking.parameter import MaskedParameter


def check_optimizer(optimizer: Optimizer, entries: Sequence[MaskedParameter], family: Family) -> None:
    """Check that an optimizer can train masks.

    Raises:
        ValueError: it holds none of the scores, holds theta itself, or would decay the scores.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if family.trains_scores and not any(id(entry.scores) in held for entry in entries):
        raise ValueError("the optimizer holds none of these masks' scores; build it over masks.parameters()")
    if thetas := [entry.name for entry in entries if id(entry.theta) in held]:
        raise ValueError(
            f"the optimizer holds theta itself ({thetas[0]} and {len(thetas) - 1} more), which a step would "
            f"overwrite; give it masks.parameters() and, for the rest of the model, masks.other_parameters()"
        )
    check_decay(optimizer, entries, family)


def check_decay(optimizer: Optimizer, entries: Sequence[MaskedParameter], family: Family) -> None:
    """Raise a ValueError where an optimizer decays scores."""
    scores = {id(entry.scores) for entry in entries}
    for group in optimizer.param_groups:
        if family.starts_from_weight:
            break  # a latent weight may decay
        if group.get("weight_decay") and any(id(parameter) in scores for parameter in group["params"]):
            raise ValueError(
                f"weight_decay={group['weight_decay']} on the scores would pull them to the threshold; "
                f"give them a parameter group with weight_decay=0"
            )


def check_steps_others(optimizer: Optimizer, entries: Sequence[MaskedParameter]) -> None:
    """Check that an optimizer of masks that are detached has something else to train.

    Raises:
        ValueError: its step trained nothing.
    """
    own = {id(tensor) for entry in entries for tensor in (entry.scores, entry.weight, entry.numbers)}
    others = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in own]
    if all(parameter.grad is None for parameter in others):
        raise ValueError(
            f"the masks that this {type(optimizer).__name__} trains are detached from their model, so its "
            f"step trained nothing. End the training before detach(), or attach masks again and build an "
            f"optimizer over theirs"
        )
