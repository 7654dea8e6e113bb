"""From `engine.name` to an engine, with an error that says what is missing."""

import importlib
from collections.abc import Sequence

from torch import nn

from selfmask_dist.parallel.engine import Engine, EngineOptions
from selfmask_dist.parallel.world import World

_KINDS = {
    "ddp": ("ddp", "DDPEngine"),
    "fsdp": ("fsdp", "FSDPEngine"),
    "bits": ("bits", "BitsEngine"),
    "deepspeed": ("deepspeed", "DeepSpeedEngine"),
}
ENGINES = tuple(_KINDS)


def build_engine(
    module: nn.Module,
    *,
    encoder: nn.Module,
    blocks: Sequence[str] = (),
    world: World,
    options: EngineOptions,
) -> Engine:
    """Make the engine `options.name` for a module; see `Engine` for the arguments. Collective.

    Raises:
        ValueError: no such engine, or one that cannot run here.
    """
    if options.name not in _KINDS:
        raise ValueError(f"engine.name {options.name!r} is not one of {', '.join(_KINDS)}")
    module_name, class_name = _KINDS[options.name]
    # imported here: each engine pulls in a library of its own
    kind: type[Engine] = getattr(importlib.import_module(f"selfmask_dist.parallel.{module_name}"), class_name)
    return kind(module, encoder=encoder, blocks=blocks, world=world, options=options)
