"""The parameters to mask and the family, from the arguments of `attach`, or why they cannot be.

Knows nothing of files, process groups or optimizers.
"""

import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Unpack

from torch import Tensor, nn

from selfmask_dist.common.tensor_names import plain, renamed
from selfmask_dist.masking import core, first_scores, selection
from selfmask_dist.masking.checks.models import check_finite_weights, check_free, check_model, check_underived
from selfmask_dist.masking.checks.scores import check_same_names, check_tensors, own_init
from selfmask_dist.masking.checks.warned import PartlyMaskedWarning
from selfmask_dist.masking.families import Family
from selfmask_dist.masking.families import build as build_family

_LOG = logging.getLogger(__name__)


def as_family(family: str | Family, *, threshold: float | None, scale: core.Scale | None) -> Family:
    """Return a family by its name with these options, None for its own; one that is built stays as it is.

    Raises:
        ValueError: there is no such family or scale, or an option is given beside a family that is built.
    """
    given = {"threshold": threshold, "scale": scale}
    options = {name: value for name, value in given.items() if value is not None}
    if isinstance(family, str):
        return build_family(family, **options)
    if options:
        raise ValueError(f"{' and '.join(options)} given beside a built family; give it to build_family")
    return family


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
    check_model(model)
    names = selection.select(model, **selected)
    check_free(model, names)
    check_underived(model, names)
    threshold = family.options.threshold
    if isinstance(init, Mapping):
        check_tensors(init, "first scores")
        init = own_init(init, names)
        check_same_names(set(init), set(names), "init")
    elif isinstance(init, str):
        first_scores.check_kind(init)
    elif family.has_threshold and not init > threshold:
        raise ValueError(f"init {init} is not above threshold {threshold}: every weight would start pruned")
    parameters = dict(model.named_parameters())
    for name in names:
        parameter = parameters[name]
        if not parameter.is_floating_point():
            raise ValueError(
                f"{name} has dtype {parameter.dtype}; only floating-point parameters can be masked"
            )
        if isinstance(init, Mapping) and init[name].shape != parameter.shape:
            raise ValueError(
                f"init of {name} has shape {tuple(init[name].shape)}, the parameter has "
                f"{tuple(parameter.shape)}"
            )
    check_finite_weights({name: parameters[name] for name in names})
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
    new_names = renamed(other, names)
    other = {new_names[name]: tensor for name, tensor in other.items()}
    parameters = dict(model.named_parameters())
    for name in names:
        found = tuple(other[name].shape) if name in other else "nothing"
        if found != tuple(parameters[name].shape):
            raise ValueError(
                f"the second weights have {found} for {name}, the model has "
                f"{tuple(parameters[name].shape)}; give weights of the same architecture"
            )
    return {name: other[name] for name in names}


def warn_where_partly_masked(model: nn.Module, include: str | Sequence[str]) -> None:
    """Say in the log which rule `auto` is here; warn where presets mask less than half of the matrices."""
    if "auto" in selection.as_tuple(include):
        _LOG.info("include=auto is the rule %s on this model", selection.rule_of(model))
    if found := selection.uncovered(model, include):
        warnings.warn(
            f"include={include!r} masks {found}. Name the layers by patterns of your own, for example "
            f"include='*{plain(found.left_out[0]).rpartition('.')[0].rpartition('.')[2]}*'",
            PartlyMaskedWarning,
            stacklevel=3,
        )


def num_segments(name: str, *, split_qkv: bool) -> int:
    """Return how many scales a parameter has."""
    return 3 if split_qkv and selection.is_fused_qkv(name) else 1
