"""A plan in one line: what a run takes on the machines it gets, as it is said before a job is submitted.

    4 x 8 H100, 8 images a GPU, about 5 h, 31 GiB of 80 (...)

    a step   the slower of its upper bound (see `steps`) and of reading its pictures: images of a GPU /
             (engine.workers x 200 a second, which one CPU core does for SwAV's eight crops)
    in all   steps x that for each mask, of experts in turns, and a pass over data.train for each embedding

The rest is reckoned as `selfmask plan` does; nothing is measured.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

from selfmask_dist.cli.plan.hardware import GIB, Hardware
from selfmask_dist.cli.plan.stages import reckon_evaluating, reckon_experts, steps_of
from selfmask_dist.cli.plan.steps import Estimate, bank_bytes, estimate, measure
from selfmask_dist.config import Config
from selfmask_dist.data.indexing.manifest import MANIFEST_NAME

_ONE_TRAINING = ("mask", "finetune", "cascade", "probe", "frozen")
_NOT_TRAINED = ("probe", "frozen")
_READ_A_SECOND = 200.0  # pictures, by one worker: benchmarks/results/data_throughput.json has 214


@dataclass(frozen=True)
class Short:
    """What a run needs: seconds in all (of a procedure: of each training), and bytes of a GPU.

    images: of a GPU in a step, all micro-steps together.
    """

    images: int
    seconds: float
    memory: float
    engine: str

    @property
    def hours(self) -> str:
        """Return the time in words, rounded as far as such a number may be trusted."""
        hours = self.seconds / 3600
        if hours < 1 / 6:
            return f"{max(math.ceil(60 * hours), 1)} min"
        return f"{hours:.1f} h" if hours < 3 else f"{hours:,.0f} h"


def reckon(config: Config, hardware: Hardware) -> Short:
    """Return what a run needs with the engine of its configuration. Raises as `steps.measure` does."""
    size, image_size = measure(config)
    engine = _own(estimate(size, config, hardware, image_size=image_size), config)
    evaluating = reckon_evaluating(size, config, hardware, engine)
    passes, masks = evaluating.passes, 1.0
    seconds = (
        0.0 if config.method in _NOT_TRAINED else steps_of(config, hardware) * _step(config, hardware, engine)
    )
    if config.method == "cascade":
        experts = reckon_experts(size, config, hardware, image_size=image_size)
        groups, turns = experts.ranks, math.ceil(experts.count / experts.groups)
        within = min(groups, hardware.gpus_per_node)
        part = replace(hardware, nodes=-(-groups // within), gpus_per_node=within)
        expert = _own(estimate(size, config, part, image_size=image_size), config)
        steps = steps_of(config, hardware)  # of an expert, too, unless it has as many epochs instead
        share = 1.0 if config.cascade.expert_epochs == "equal_steps" else 1 / experts.count
        seconds += turns * share * steps * _step(config, part, expert)
        passes, masks = 1, experts.count + 2.0  # frozen, dispatcher and experts embed all pictures
    reading = hardware.pictures / (_readers(config) * hardware.world_size)
    seconds += passes * masks * max(evaluating.seconds, reading)
    memory = engine.memory + (bank_bytes(config, hardware) if config.objective.name == "nbd" else 0.0)
    return Short(_images(config, hardware), seconds, memory, engine.engine)


def in_a_line(config: Config, hardware: Hardware) -> str:
    """Return the line. The number of pictures is that of `data.train` where its folder says it."""
    pictures = known_pictures(config)
    on = hardware if pictures is None else replace(hardware, pictures=pictures)
    short = reckon(config, on)
    each = "" if config.method in _ONE_TRAINING else " for each training"
    count = f"{on.pictures:,} pictures" if pictures is not None else f"{on.pictures:,} pictures, a guess"
    return (
        f"{on.nodes} x {on.gpus_per_node} H100, {short.images} images a GPU, about {short.hours}{each}, "
        f"{short.memory / GIB:.0f} GiB of {on.memory_gib:g} (reckoned with {short.engine} for {count})"
    )


def known_pictures(config: Config) -> int | None:
    """Return the number of pictures in `data.train`, where it is a folder that says so by itself."""
    if config.data.train is None:
        return None
    try:
        return int(json.loads((Path(config.data.train) / MANIFEST_NAME).read_text())["num_samples"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _images(config: Config, hardware: Hardware) -> int:
    return -(-config.train.global_batch_size // hardware.world_size)


def _readers(config: Config) -> float:
    """Return the pictures that the workers of a process read in a second."""
    return max(config.engine.workers, 1) * _READ_A_SECOND


def _step(config: Config, hardware: Hardware, engine: Estimate) -> float:
    return max(engine.seconds[1], _images(config, hardware) / _readers(config))


def _own(estimates: list[Estimate], config: Config) -> Estimate:
    """Return the estimate of the engine that the configuration names."""
    engine = config.engine
    name = f"deepspeed-{engine.zero_stage}" if engine.name == "deepspeed" else engine.name
    return next(found for found in estimates if found.engine == name)
