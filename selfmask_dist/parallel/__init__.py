"""Engines: how a training step runs on many processes."""

from selfmask_dist.parallel.ddp import DDPEngine
from selfmask_dist.parallel.engine import Engine
from selfmask_dist.parallel.world import World, join_world

__all__ = ["DDPEngine", "Engine", "World", "join_world"]
