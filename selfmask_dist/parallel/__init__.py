"""Engines: how a training step runs on many processes."""

from selfmask_dist.parallel.batchnorm import synchronise_batchnorm
from selfmask_dist.parallel.build import ENGINES, build_engine
from selfmask_dist.parallel.engine import Engine, EngineOptions
from selfmask_dist.parallel.lost import is_lost_peer
from selfmask_dist.parallel.trained import EngineState
from selfmask_dist.parallel.world import START_TIMEOUT, World, join_world, set_timeout

__all__ = [
    "ENGINES",
    "START_TIMEOUT",
    "Engine",
    "EngineOptions",
    "EngineState",
    "World",
    "build_engine",
    "is_lost_peer",
    "join_world",
    "set_timeout",
    "synchronise_batchnorm",
]
