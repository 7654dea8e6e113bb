"""Engines: how one training step runs on many processes, see `engine`."""

import importlib
from collections.abc import Sequence

from torch import nn

from selfmask_dist.config.sections import EngineConfig
from selfmask_dist.masking.core import ScoreStep
from selfmask_dist.parallel.agreement import take_from_main
from selfmask_dist.parallel.batchnorm import synchronise_batchnorm
from selfmask_dist.parallel.engine import Engine
from selfmask_dist.parallel.parts import EngineState
from selfmask_dist.parallel.world import START_TIMEOUT, World, is_lost_peer, join_world, set_timeout

__all__ = [
    "START_TIMEOUT",
    "Engine",
    "EngineState",
    "World",
    "build_engine",
    "is_lost_peer",
    "join_world",
    "set_timeout",
    "shards_weights",
    "synchronise_batchnorm",
    "take_from_main",
]

_CLASSES = {"ddp": "DDPEngine", "fsdp": "FSDPEngine", "bits": "BitsEngine", "deepspeed": "DeepSpeedEngine"}


def build_engine(
    module: nn.Module,
    *,
    encoder: nn.Module,
    blocks: Sequence[str] = (),
    world: World,
    config: EngineConfig,
    accumulate: int = 1,
    clip_norm: float | None = None,
    score_step: ScoreStep = "plain",
) -> Engine:
    """Return the engine `config.name` around a module; see `Engine` for the arguments. Collective.

    Raises:
        ValueError: this engine cannot run here.
    """
    # imported here: each engine pulls in a library of its own
    engine_module = importlib.import_module(f"selfmask_dist.parallel.{config.name}")
    kind: type[Engine] = getattr(engine_module, _CLASSES[config.name])
    return kind(
        module,
        encoder=encoder,
        blocks=blocks,
        world=world,
        config=config,
        accumulate=accumulate,
        clip_norm=clip_norm,
        score_step=score_step,
    )


def shards_weights(config: EngineConfig, world: World) -> bool:
    """Return whether an evaluation must not hold the encoder whole either: the engine cuts it over ranks, or
    keeps it in the CPU's memory.
    """
    cuts = config.name == "fsdp" or (config.name == "deepspeed" and config.zero_stage == 3)
    return cuts and (world.size > 1 or config.cpu_offload)
