"""Whether masks can go on a model: its tensors, what it carries already, layers that derive their weight."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from selfmask_dist.common.text import some
from selfmask_dist.masking import marks


def check_model(model: nn.Module) -> None:
    """Check that masks can be trained on `model`.

    Raises:
        TypeError: it is no module.
        ValueError: it was made, or masks are to be, under torch.inference_mode.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"masks go on a torch.nn.Module, and this is a {type(model).__name__}; give the model itself"
        )
    where = [name for name, parameter in model.named_parameters() if parameter.is_inference()]
    if where or torch.is_inference_mode_enabled():
        what = f"{where[0]} was made" if where else "attach was called"
        raise ValueError(
            f"{what} under torch.inference_mode, whose tensors never get a gradient. Build the model and "
            f"attach outside of it; torch.no_grad is fine"
        )


def check_finite_weights(weights: Mapping[str, Tensor]) -> None:
    """Raise a ValueError where a weight to mask is NaN or infinite. One device sync."""
    plain_ones = {n: w for n, w in weights.items() if type(w) is nn.Parameter and not w.is_meta}
    counts = [(~weight.isfinite()).sum() for weight in plain_ones.values()]
    if counts and (total := int(torch.stack([count.cpu() for count in counts]).sum())):
        bad = [name for name, count in zip(plain_ones, counts, strict=True) if count]
        raise ValueError(
            f"{total:,} weights of {some(bad)} are not finite (NaN or infinite), so everything computed with "
            f"them would be; load the pretrained weights again, from a file that is whole"
        )


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
