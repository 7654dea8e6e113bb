"""A procedure to its end: its run's folder, its chain of stages, its result."""

import json
from collections.abc import Callable
from typing import Any

from selfmask_dist.common import names
from selfmask_dist.common.files import write_json
from selfmask_dist.config import Config
from selfmask_dist.parallel import join_world
from selfmask_dist.procedures.ensemble import run_ensemble
from selfmask_dist.procedures.evolution import run_evolution
from selfmask_dist.procedures.lottery import run_lottery
from selfmask_dist.procedures.packnet import run_packnet
from selfmask_dist.procedures.rebasin import run_rebasin
from selfmask_dist.procedures.supsup import run_supsup
from selfmask_dist.procedures.wise_ft import run_wise_ft
from selfmask_dist.runs.context import open_run
from selfmask_dist.runs.folder import create_run_directory, run_path
from selfmask_dist.runs.preempt import StopRequest
from selfmask_dist.training.adapt import format_numbers
from selfmask_dist.training.chain import Chain

_PROCEDURES: dict[str, Callable[[Chain], dict[str, Any]]] = {
    "packnet": run_packnet,
    "lottery": run_lottery,
    "evolution": run_evolution,
    "supsup": run_supsup,
    "wise_ft": run_wise_ft,
    "rebasin": run_rebasin,
    "ensemble": run_ensemble,
}


def run_procedure(config: Config, stop: StopRequest, *, is_restart: bool) -> dict[str, Any]:
    """Run a procedure to its end; returns what its `result.json` holds. Every process of the run calls this.

    Raises:
        ValueError: configuration, data or backbone cannot be used.
        Preempted: asked to stop; started again, it goes on.
    """
    section = config.engine
    with join_world(section.device, threads=section.threads, needs_group=section.name != "ddp") as world:
        directory = run_path(config)
        if world.is_main:
            create_run_directory(config, is_restart=is_restart)
        world.barrier()
        path = directory / names.RESULT
        if not path.exists():
            result = {"method": config.method} | _PROCEDURES[config.method](Chain(config, world, stop))
            with open_run(config, directory, world, stop) as context:
                if world.is_main:
                    write_json(path, result)
                world.barrier()
                context.writer.event("end", **result)
                context.writer.message(f"{config.method}: {format_numbers(result['adapted'])}")
        finished: dict[str, Any] = json.loads(path.read_text())
        return finished
