"""Whether an optimizer can train masks, and whether it still does."""

from collections.abc import Sequence
from typing import Any, get_args

from torch.optim import Optimizer

from selfmask_dist.masking import core
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


def check_steps_others(optimizer: Optimizer) -> None:
    """Check that an optimizer of masks that are detached has something to train still.

    Raises:
        ValueError: none of its parameters has a gradient, so its step trained nothing.
    """
    if all(parameter.grad is None for group in optimizer.param_groups for parameter in group["params"]):
        raise ValueError(
            f"the masks that this {type(optimizer).__name__} trains are detached from their model, so its "
            f"step trained nothing. End the training before detach(), or attach masks again and build an "
            f"optimizer over theirs"
        )


def check_score_step(score_step: core.ScoreStep, optimizer: Optimizer, family: Family) -> None:
    """Check that a score step can be made by an optimizer, for masks of a family.

    Raises:
        ValueError: the name is unknown, the optimizer sizes its steps itself, or no scores are trained.
    """
    if score_step not in get_args(core.ScoreStep):
        raise ValueError(f"score_step {score_step!r} is not one of {', '.join(get_args(core.ScoreStep))}")
    if score_step == "plain":
        return
    if "betas" in optimizer.defaults:
        raise ValueError(
            f"score_step='rms' gives each tensor's step one size, and {type(optimizer).__name__} gives each "
            f"element's a size of its own; take torch.optim.SGD, or score_step='plain'"
        )
    if family.starts_from_weight or not (family.trains_scores or has_numbers(family)):
        raise ValueError(
            f"score_step='rms' is for scores, and the family {family.name} trains none; take "
            f"score_step='plain'"
        )


def check_no_closure(optimizer: Optimizer, arguments: Sequence[Any]) -> None:
    """Check that `optimizer.step` was called without a closure.

    Raises:
        ValueError: it was; its backward would come after the gradients were normalised.
    """
    # torch hands a hook the optimizer itself among the arguments
    if any(argument is not None and argument is not optimizer for argument in arguments):
        raise ValueError(
            "score_step='rms' normalises gradients before optimizer.step(closure) calls the closure, which "
            "computes new ones; call backward first and step() without a closure, or bind with "
            "score_step='plain' and call masks.normalise_gradients() at the end of the closure"
        )


def has_numbers(family: Family) -> bool:
    """Return whether a family trains small numbers beside the scores or in their place."""
    return type(family).first_numbers is not Family.first_numbers
