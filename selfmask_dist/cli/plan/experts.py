"""What a process needs while an expert of a cascade trains, as the planner reckons it.

`cascade.run` bounds the groups of processes by it.
Knows nothing of runs; a cascade does not import the command line, and is handed this function.
"""

from selfmask_dist.cli.plan.hardware import Hardware
from selfmask_dist.cli.plan.steps import bank_bytes, plan
from selfmask_dist.config import Config


def bytes_of_a_process(config: Config, num_processes: int, pictures: int) -> float | None:
    """Return the bytes that each of `num_processes` processes needs to train masks; None where the planner
    does not know the backbone.

    Args:
        pictures: that are trained on.
    """
    hardware = Hardware(gpus_per_node=num_processes, pictures=pictures)
    try:
        estimates = {estimate.engine: estimate for estimate in plan(config, hardware)}
    except ValueError:
        return None
    engine = config.engine
    name = f"deepspeed-{engine.zero_stage}" if engine.name == "deepspeed" else engine.name
    return estimates[name].memory + (bank_bytes(config, hardware) if config.objective.name == "nbd" else 0.0)
