"""Masks and adapters of peft's other methods on one model, one of them on at a time.

    model = get_peft_model(frozen, SelfMaskConfig(...), adapter_name="pets")
    model.add_adapter("birds", SelfMaskConfig(...))
    model = put_around(model, LoraConfig(...), adapter_name="low")
    switch_to(model, "birds"); switch_to(model, "low"); switch_to(model, None)

peft itself puts methods side by side in a `PeftMixedModel`, which knows its own methods alone. Here one peft
model is put around another, and a switch goes through the layers of both: those that have the adapter are put
on, all others are put off. Nothing is computed or copied, so it takes as long as going through the modules.
"""

from collections.abc import Iterator
from typing import Any

from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn


class Within(nn.Module):
    """A peft model that another is put around. peft looks for an inner one's settings, and would mix them up
    with its own; they are out of its sight here.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


def put_around(model: nn.Module, config: PeftConfig, *, adapter_name: str) -> PeftModel:
    """Return a peft model of another method around one that has masks, which stays as it is.

    Args:
        model: a peft model, at the layers of which both methods may be.
        config: of the other method, for example a `LoraConfig`.
    """
    return PeftModel(Within(model), config, adapter_name=adapter_name)


_Switched = BaseTunerLayer | AuxiliaryTrainingWrapper


def adapters_of(model: nn.Module) -> list[str]:
    """Return the names of the adapters of a peft model, and of the one that it is around, the inner first."""
    found: list[str] = []
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        if isinstance(configs, dict):
            found = [*configs, *found]
    return list(dict.fromkeys(found))


def switch_to(model: nn.Module, adapter: str | None) -> None:
    """Put one adapter on and every other one off, in place; None: the frozen model.

    Args:
        model: a peft model, or one around another.

    Raises:
        ValueError: there is no adapter of that name, two methods have one, or a layer holds a merged one.
    """
    layers = list(_layers(model))
    if merged := [layer for layer in layers if getattr(layer, "merged", False)]:
        names = sorted({name for layer in merged for name in layer.merged_adapters})
        raise ValueError(f"{names} are merged into the weights; call unmerge_adapter before a switch")
    kinds = {_kind(layer) for layer in layers if adapter is not None and _has(layer, adapter)}
    if adapter is not None and not kinds:
        raise ValueError(f"there is no adapter {adapter!r}; there are {adapters_of(model)}")
    if len(kinds) > 1:
        raise ValueError(f"two methods have an adapter {adapter!r}: {sorted(kinds)}; give it another name")
    for layer in layers:
        is_on = adapter is not None and _has(layer, adapter)
        layer.enable_adapters(is_on)
        if is_on:
            layer.set_adapter(adapter)


def _layers(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        if isinstance(module, _Switched):
            yield module


def _has(layer: Any, adapter: str) -> bool:
    if isinstance(layer, AuxiliaryTrainingWrapper):
        return adapter in layer.modules_to_save
    return any(
        isinstance(held := getattr(layer, name), nn.ModuleDict | nn.ParameterDict) and adapter in held
        for name in layer.adapter_layer_names
    )


def _kind(layer: Any) -> str:
    """Return the package of a layer's method; wrappers of whole modules belong to any."""
    return "" if isinstance(layer, AuxiliaryTrainingWrapper) else type(layer).__module__.rpartition(".")[0]
