"""Any method of peft as a baseline: `finetune.peft={method: VERA, r: 16}`.

The method's own modules go onto the frozen network in place, before an engine wraps it; what is trained are
the parameters that its prefix names. Methods that do not add to modules (prompts) or take part in the
training loop (AdaLoRA's ranks) are refused. Knows nothing of engines or objectives.
"""

import dataclasses
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from selfmask_dist.common.optional import require
from selfmask_dist.common.text import some
from selfmask_dist.masking.selection import norm_parameters

# these ask the training loop for calls of their own, or route between other adapters
_IN_THE_LOOP = ("ADALORA", "XLORA", "POLY", "TRAINABLE_TOKENS", "CARTRIDGE", "SHADOW", "OSF")
METHOD = "method"  # the key of a section's `peft` that names the method
_TARGETS = "target_modules"


def add_method(
    model: nn.Module,
    settings: Mapping[str, Any],
    *,
    seed: int,
    auto_fn: Callable[[nn.Module], list[str]],
) -> list[str]:
    """Put a method's modules onto `model`, in place; return the names of the parameters that it trains.

    Args:
        settings: `method`, and arguments of its configuration in peft.
        seed: of what the method draws; the global generators are left as they were.
        auto_fn: the modules to add to where `target_modules` is not given; LN_TUNING then takes the
            normalisation layers.

    Raises:
        ValueError: peft is not installed, has no such method or argument, or cannot put it on this network.
    """
    peft = require("peft", "peft", extra="lora", needed_by="finetune.peft")
    mapping = require("peft.mapping", "peft", extra="lora")
    method, arguments = str(settings.get(METHOD, "")).upper(), {**settings}
    arguments.pop(METHOD, None)
    kind = next((one for one in mapping.PEFT_TYPE_TO_CONFIG_MAPPING if one.value == method), None)
    config_class = mapping.PEFT_TYPE_TO_CONFIG_MAPPING.get(kind)
    tuner_class = mapping.PEFT_TYPE_TO_TUNER_MAPPING.get(kind)
    usable = sorted(
        one.value
        for one, tuner in mapping.PEFT_TYPE_TO_TUNER_MAPPING.items()
        if tuner is not None and one.value not in _IN_THE_LOOP and _has_targets(mapping, one)
    )
    if config_class is None or tuner_class is None or method not in usable:
        raise ValueError(
            f"finetune.peft names the method {settings.get(METHOD)!r}; peft {peft.__version__} has "
            f"{', '.join(usable)} for networks of images"
        )
    if _TARGETS not in arguments:
        arguments[_TARGETS] = _norms(model) if method == "LN_TUNING" else auto_fn(model)
    before = {name for name, _ in model.named_parameters()}
    try:
        config = config_class(**arguments)
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            if method == "LN_TUNING":  # it copies layers, and peft warns that it knows no matrix in them
                warnings.filterwarnings("ignore", "Unsupported layer type", UserWarning)
            torch.default_generator.manual_seed(seed)
            # not inject_adapter_in_model, which refuses methods whose modules share tensors (VeRA)
            tuner_class(model, config, adapter_name="default")
    except (TypeError, ValueError, AttributeError, NotImplementedError) as error:
        known = [field.name for field in dataclasses.fields(config_class)]
        raise ValueError(
            f"finetune.peft={{method: {method}, ...}} does not go onto this network: {error}. Its arguments "
            f"are {some(known)}; target_modules names modules, for example [blocks.0.attn.qkv]"
        ) from error
    added = [name for name in trained_names(model, method) if name not in before]
    if not added:
        raise ValueError(f"finetune.peft={{method: {method}}} adds nothing to train to this network")
    return added


def trained_names(model: nn.Module, method: str) -> list[str]:
    """Return the names of the parameters that a method has put onto a network, in the network's order."""
    mapping = require("peft.mapping", "peft", extra="lora", needed_by="finetune.peft")
    prefix = next(
        prefix for kind, prefix in mapping.PEFT_TYPE_TO_PREFIX_MAPPING.items() if kind.value == method.upper()
    )
    return [name for name, _ in model.named_parameters() if f".{prefix}" in name]


def _has_targets(mapping: Any, kind: Any) -> bool:
    fields = dataclasses.fields(mapping.PEFT_TYPE_TO_CONFIG_MAPPING[kind])
    return any(field.name == _TARGETS for field in fields)


def _norms(model: nn.Module) -> str:
    """Return the normalisation layers as one regular expression: a list would match by the ends of names."""
    found = {name.rpartition(".")[0] for name in norm_parameters(model)}
    return "|".join(re.escape(name) for name in sorted(found))
