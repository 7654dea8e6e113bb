"""Engines: how a training step runs on many processes."""

from selfmask_dist.parallel.batchnorm import synchronise_batchnorm
from selfmask_dist.parallel.build import ENGINES, build_engine
from selfmask_dist.parallel.engine import Engine, EngineOptions, EngineState
from selfmask_dist.parallel.world import World, join_world

__all__ = [
    "ENGINES",
    "Engine",
    "EngineOptions",
    "EngineState",
    "World",
    "build_engine",
    "join_world",
    "synchronise_batchnorm",
]
