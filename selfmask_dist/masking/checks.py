"""What every way of attaching masks checks first.

Knows nothing of files, process groups or optimizers.
"""

from collections.abc import Mapping, Sequence
from typing import Unpack

from torch import Tensor, nn

from selfmask_dist.masking import first_scores, selection
from selfmask_dist.masking.families import Family

MARK = "_is_masked"  # an attribute of every theta, so that no parameter gets two masks


def choose(
    model: nn.Module,
    *,
    family: Family,
    init: float | str | Mapping[str, Tensor],
    **selected: Unpack[selection.Selection],
) -> list[str]:
    """Return the names of the parameters to mask; the arguments are those of `attach`.

    Raises:
        ValueError: nothing matches, a normalisation layer would be masked, scores would all start pruned,
            names, shapes or dtypes do not fit, or a parameter is masked already.
    """
    names = selection.select(model, **selected)
    threshold = family.options.threshold
    if isinstance(init, Mapping):
        check_same_names(set(init), set(names), "init")
    elif isinstance(init, str):
        first_scores.check_kind(init)
    elif family.has_threshold and not init > threshold:
        raise ValueError(f"init {init} is not above threshold {threshold}: every weight would start pruned")
    parameters = dict(model.named_parameters())
    for name in names:
        parameter = parameters[name]
        if hasattr(parameter, MARK):
            raise ValueError(f"{name} carries a mask already; call detach() on the earlier masks first")
        if not parameter.is_floating_point():
            raise ValueError(
                f"{name} has dtype {parameter.dtype}; only floating-point parameters can be masked"
            )
        if isinstance(init, Mapping) and init[name].shape != parameter.shape:
            raise ValueError(
                f"init of {name} has shape {tuple(init[name].shape)}, the parameter has "
                f"{tuple(parameter.shape)}"
            )
    return names


def choose_other(
    model: nn.Module, names: Sequence[str], other: Mapping[str, Tensor] | None, *, family: Family
) -> Mapping[str, Tensor]:
    """Return the second frozen weights of the parameters `names`; none where a family has none.

    Raises:
        ValueError: they are missing, not asked for, or of other shapes.
    """
    if not family.needs_other:
        if other is not None:
            raise ValueError(f"family {family.name} has no second weights; leave other= out, or use graft")
        return {}
    if other is None:
        raise ValueError(
            f"family {family.name} toggles between two sets of weights; give the second one as other= "
            f"(mask.graft_from in a configuration)"
        )
    parameters = dict(model.named_parameters())
    for name in names:
        found = tuple(other[name].shape) if name in other else "nothing"
        if found != tuple(parameters[name].shape):
            raise ValueError(
                f"the second weights have {found} for {name}, the model has "
                f"{tuple(parameters[name].shape)}; give weights of the same architecture"
            )
    return {name: other[name] for name in names}


def num_segments(name: str, *, split_qkv: bool) -> int:
    """Return how many scales a parameter has."""
    return 3 if split_qkv and selection.is_fused_qkv(name) else 1


def check_same_names(given: set[str], expected: set[str], what: str) -> None:
    """Raise a ValueError where the names of `what` (scores, say) are not the masked parameters'."""
    if given != expected:
        missing, unknown = sorted(expected - given), sorted(given - expected)
        raise ValueError(
            f"{what} do not fit the masked parameters: missing {missing[:5]}, unknown {unknown[:5]}"
        )
