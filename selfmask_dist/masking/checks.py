"""What every way of attaching masks checks first.

Knows nothing of files, process groups or optimizers.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Unpack, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from selfmask_dist.common.tensor_names import plain, renamed
from selfmask_dist.common.text import some
from selfmask_dist.masking import core, first_scores, marks, selection
from selfmask_dist.masking.families import Family
from selfmask_dist.masking.families import build as build_family
from selfmask_dist.masking.parameter import MaskedParameter

_HALVES = ("float16", "bfloat16")


class MaskWarning(UserWarning):
    """Masks are used in a way that is hardly meant."""


class PartlyMaskedWarning(MaskWarning):
    """A preset masks less than half of a model's matrices."""


class ForgottenBindWarning(MaskWarning):
    """Masks get gradients, other parameters are stepped, and no optimizer is bound to the masks."""


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
    names = selection.select(model, **selected)
    check_free(model, names)
    check_underived(model, names)
    threshold = family.options.threshold
    if isinstance(init, Mapping):
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


def own_init(init: Mapping[str, Tensor], names: Sequence[str]) -> Mapping[str, Tensor]:
    """Return given first scores by the names of the parameters to mask, which may be wrapped otherwise."""
    given = {name: scores for name, scores in init.items() if ":" not in name}
    new_names = renamed(given, names)
    return {new_names[name]: scores for name, scores in given.items()}


def check_same_weights(found: str, expected: str, thetas: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Check that scores are loaded onto the weights that they were trained on.

    Args:
        found, expected: fingerprints of the weights here, and of those that the scores are for.
        thetas: {name: (weights here, which of them the scores prune)}.

    Raises:
        ValueError: they are others; the message says which.
    """
    if found == expected:
        return
    zeros = [int((weight[pruned] == 0).sum()) for weight, pruned in thetas.values()]
    num_pruned = sum(int(pruned.sum()) for _, pruned in thetas.values())
    text = (
        f"these scores were trained on weights with fingerprint {expected[:12]}, and the weights under the "
        f"masks here have {found[:12]}"
    )
    order = "Load the pretrained weights, attach, then load the scores; the model's own state is not needed"
    if num_pruned and sum(zeros) == num_pruned:
        raise ValueError(
            f"{text}: they are a theta. All {num_pruned:,} weights that the scores prune are zero already: "
            f"the model's state was saved with masks on, and was loaded before attach. {order}"
        )
    dtypes = {str(weight.dtype).removeprefix("torch.") for weight, _ in thetas.values()}
    half = ", the same ones in another precision" if dtypes <= set(_HALVES) else ""
    raise ValueError(
        f"{text} ({', '.join(sorted(dtypes))}): another backbone, other pretrained weights{half}, or a "
        f"model's state that was saved with masks on and loaded before attach. {order}"
    )


def warn_where_partly_masked(model: nn.Module, include: str | Sequence[str]) -> None:
    """Warn where presets mask less than half of the model's matrices, naming what they leave out."""
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


def check_same_names(given: set[str], expected: set[str], what: str) -> None:
    """Raise a ValueError where the names of `what` (scores, say) are not the masked parameters'."""
    if given != expected:
        missing, unknown = sorted(expected - given), sorted(given - expected)
        raise ValueError(
            f"{what} do not fit the masked parameters: missing {missing[:5]}, unknown {unknown[:5]}"
        )


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
    scores = {id(entry.scores) for entry in entries}
    for group in optimizer.param_groups:
        if family.starts_from_weight:
            break  # a latent weight may decay
        if group.get("weight_decay") and any(id(parameter) in scores for parameter in group["params"]):
            raise ValueError(
                f"weight_decay={group['weight_decay']} on the scores would pull them to the threshold; "
                f"give them a parameter group with weight_decay=0"
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


def own_state(
    state: Mapping[str, Tensor], names: Sequence[str], shapes: Mapping[str, torch.Size]
) -> dict[str, Tensor]:
    """Return a state's tensors by the names that the masked parameters have now.

    Args:
        names: of the masked parameters.
        shapes: of all tensors that belong to them, by key.

    Raises:
        ValueError: names or shapes differ.
    """
    new_names = renamed([key for key in state if ":" not in key], names)
    parts = {key: key.partition(":") for key in state}
    own = {f"{new_names.get(n, n)}{colon}{part}": state[key] for key, (n, colon, part) in parts.items()}
    check_same_names(set(own), set(shapes), "scores")
    for key, shape in shapes.items():
        if own[key].shape != shape:
            raise ValueError(
                f"scores of {key} have shape {tuple(own[key].shape)}, the parameter has {tuple(shape)}"
            )
    return own


def check_free(model: nn.Module, names: Sequence[str]) -> None:
    """Check that the parameters `names` are frozen weights, and not theta of other masks.

    Raises:
        ValueError: one carries a mask, or the model is one whose weights are theta without its masks.
    """
    thetas = {id(mark.entry.theta) for mark in marks.attached(model).values()}
    parameters = dict(model.named_parameters())
    for name in names:
        if id(parameters[name]) in thetas or hasattr(parameters[name], marks.MARK):
            raise ValueError(
                f"{name} carries a mask already; call detach() on the earlier masks first, or, where they "
                f"are lost, selfmask_dist.detach(model)"
            )
    if found := marks.left_over(model):
        raise ValueError(marks.describe_left_over(found))


# ---- layers that derive their weight


def check_underived(model: nn.Module, names: Sequence[str]) -> None:
    """Check that the layers of `names` compute with these parameters, and not with what they make of them.

    Weights that a mask sets to zero come back where a layer standardises or normalises them.

    Raises:
        ValueError: a layer derives its weight from one of them.
    """
    by_owner: dict[str, list[str]] = {}
    for name in names:
        by_owner.setdefault(name.rpartition(".")[0], []).append(name)
    checked: dict[type, bool] = {}
    derived: dict[str, str] = {}
    for owner, of_owner in by_owner.items():
        module = model.get_submodule(owner)
        for name in of_owner:
            if how := _how_derived(name, module):
                derived[name] = how
        if type(module) not in checked:
            checked[type(module)] = _uses_another_weight(module)
        if checked[type(module)] and f"{owner}.weight".lstrip(".") in of_owner:
            derived[f"{owner}.weight".lstrip(".")] = f"{type(module).__name__} computes with another"
    if derived:
        name, how = next(iter(derived.items()))
        raise ValueError(
            f"{len(derived)} of the parameters to mask are not the weights that their layers compute with: "
            f"{some([f'{name} ({how})' for name, how in derived.items()])}. A weight that a mask sets to "
            f"zero would come back. Leave them out (exclude={name!r}, mask.exclude), or make the weight "
            f"plain first (torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm, "
            f"prune.remove, or a layer of the derived weight in its place)"
        )


def _how_derived(name: str, module: nn.Module) -> str:
    """Return what makes a layer's weight out of this parameter; empty where nothing does."""
    if isinstance(module, parametrize.ParametrizationList):
        return f"the original of {', '.join(type(part).__name__ for part in module)}"
    attribute = name.rpartition(".")[2]
    for key, value in vars(module).items():
        # weight_norm, spectral_norm and prune of torch.nn.utils: weight is a tensor made before each forward
        if isinstance(value, Tensor) and attribute.startswith(f"{key}_"):
            return f"{key} is made of it before each forward"
    return ""


class _Weights(TorchFunctionMode):
    """Notes the tensors that linear and convolution functions get as their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.used: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "").startswith(("linear", "conv")):
            self.used += [t for t in (*args[1:2], kwargs.get("weight")) if isinstance(t, Tensor)]
        return func(*args, **kwargs)


def _uses_another_weight(module: nn.Module) -> bool:
    """Return whether a kind of linear or convolution layer with a forward of its own derives its weight.

    Found by one forward on zeros. Kinds that cannot be run by themselves count as plain.
    """
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    kind = next((kind for kind in kinds if isinstance(module, kind)), None)
    weight = module._parameters.get("weight")
    if kind is None or type(module).forward is kind.forward or type(weight) is not nn.Parameter:
        return False
    shape = (1, weight.shape[1]) if kind is nn.Linear else (1, module.in_channels, *weight.shape[2:])
    was_training = module.training
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), _Weights() as seen:
            module.training = False
            type(module).forward(module, torch.zeros(shape, dtype=weight.dtype, device=weight.device))
    except Exception:  # a layer of another signature
        return False
    finally:
        module.training = was_training
    pointer = weight.data_ptr()
    return bool(seen.used) and not any(
        used is weight or (used.data_ptr() == pointer and not weight.is_meta) for used in seen.used
    )
