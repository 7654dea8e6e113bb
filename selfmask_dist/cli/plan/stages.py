"""What comes beside a step: training as a whole, checkpoints, evaluation, a cascade's experts.

checkpoint   4 bytes for each number of state (score, moments, a teacher's average) of a masked weight;
             every rank writes 1/world of it, from a copy in host memory
seconds      of a save: the copy, then the slower of the node's way to storage and all nodes' together;
             hashing goes along with writing. A resume reads as much
stopping     a step that is under way, a save that is under way, and one more, and as much again for
             luck: checkpoint.stop_seconds
"""

import math
from dataclasses import dataclass

from selfmask_dist.cascade.plan import choose_num_groups
from selfmask_dist.cli.plan.hardware import Hardware
from selfmask_dist.cli.plan.held import FULL, held_by
from selfmask_dist.cli.plan.model_size import ModelSize
from selfmask_dist.cli.plan.steps import Estimate, choose, estimate
from selfmask_dist.config import Config

_COPY_GBS = 10.0  # from a GPU to host memory, of a rank
_LEAST_STOP = 60  # seconds: the keys' defaults
_SIGNAL_BEFORE = 30


@dataclass(frozen=True)
class Saving:
    """What checkpoints need: bytes in all, of a rank, staged on a node; seconds; the keys they suggest."""

    total: float
    of_rank: float
    of_node: float
    seconds: float
    stop_seconds: int
    signal_seconds: int


@dataclass(frozen=True)
class Evaluating:
    """What one measurement of all training pictures needs: seconds to embed them, bytes of embeddings.

    precision: of the backbone; under fsdp a run measures in that of the engine where it is bf16.
    memory: bytes of a rank that only embeds, in a cascade or under `selfmask eval`, with masks put on; a run
        that measures while it trains has its state beside them.
    """

    passes: int  # before training and after it
    precision: str
    seconds: float
    embeddings: float
    memory: float


@dataclass(frozen=True)
class Experts:
    """How a cascade's experts are trained: groups of ranks at the same time; None where no engine fits."""

    count: int
    groups: int
    ranks: int
    engine: Estimate | None


def steps_of(config: Config, hardware: Hardware) -> int:
    """Return the steps of the training."""
    steps = math.ceil(config.train.epochs * hardware.pictures / config.train.global_batch_size)
    return min(steps, config.train.max_steps or steps)


def reckon_saving(size: ModelSize, config: Config, hardware: Hardware, step_seconds: float) -> Saving:
    """Return what checkpoints need, heads and buffers left out.

    Args:
        step_seconds: of one step, at most.
    """
    total = size.masked * held_by(config).state
    of_rank = total / hardware.world_size
    seconds = of_rank / (_COPY_GBS * 1e9) + hardware.file_seconds(total)
    needed = 2 * (2 * seconds + step_seconds)
    stop = max(_LEAST_STOP, 10 * math.ceil(needed / 10))
    return Saving(total, of_rank, total / hardware.nodes, seconds, stop, stop + _SIGNAL_BEFORE)


def reckon_evaluating(size: ModelSize, config: Config, hardware: Hardware, engine: Estimate) -> Evaluating:
    """Return what it takes to embed data.train once, on the engine's shards where it has them."""
    w = hardware.world_size
    is_bf16 = config.eval.precision == "bf16" or (
        engine.engine.startswith("fsdp") and config.engine.precision == "bf16"  # whose forward then is
    )
    tflops = hardware.tflops if is_bf16 else min(hardware.float32_tflops, hardware.tflops)
    compute = hardware.pictures * size.flops_per_image / (w * tflops * 1e12)
    batches = math.ceil(hardware.pictures / (w * config.eval.batch_size))
    gathering = batches * engine.gather_seconds
    return Evaluating(
        passes=int(config.eval.frozen_baseline) + int(config.eval.final),
        precision="bf16" if is_bf16 else "float32",
        seconds=compute + gathering,
        embeddings=FULL * hardware.pictures * size.dim,
        memory=_embedding_bytes(size, engine, w),
    )


def _embedding_bytes(size: ModelSize, engine: Estimate, world_size: int) -> float:
    """Return what a rank holds that embeds under a mask and trains nothing.

    fsdp and ZeRO-3: theta in the place of its rows of the frozen weights, which lie in their file, and two
    gathered blocks. The other engines: theta and the frozen weights, whole.
    """
    whole, both = FULL * (size.masked + size.frozen), FULL * (2 * size.masked + size.frozen)
    num_shards = {"deepspeed-3": world_size}.get(engine.engine, 1)
    if engine.engine.startswith("fsdp"):
        num_shards = round(both / engine.weights)
    if num_shards == 1:
        return both
    return whole / num_shards + size.padded(num_shards) * FULL * 2 * size.largest_block


def reckon_experts(size: ModelSize, config: Config, hardware: Hardware, *, image_size: int) -> Experts:
    """Return how experts of equal size are trained under method=cascade."""
    count = max(config.cascade.clusters)
    groups = choose_num_groups(
        [1.0] * count,
        hardware.world_size,
        config.train.global_batch_size,
        wanted=config.cascade.expert_groups,
    )
    ranks = hardware.world_size // groups
    within = min(ranks, hardware.gpus_per_node)
    part = Hardware(**{**vars(hardware), "nodes": -(-ranks // within), "gpus_per_node": within})
    engines = estimate(size, config, part, image_size=image_size)
    return Experts(count, groups, ranks, choose(engines, hardware.memory_gib))
