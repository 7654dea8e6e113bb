"""A cascade from one command: masks without labels, of a dispatcher and of one expert for each kind of image.

    frozen embeddings -> dispatcher -> its embeddings -> router -> experts -> their embeddings -> combination
    -> evaluation -> cascade.mask                                   (Warmerdam et al. 2024, section 3.4)

Dispatcher and experts are ordinary runs in folders of their own, with configurations of their own
(`dispatcher/config.yaml`, `expert-0/config.yaml`, ...). Experts train at the same time on groups of
processes. Every stage goes on where it was when the run is started again, and is skipped when it is done. The
stages themselves are in `cascade_stages`.
"""

import json
import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from selfmask_dist.cascade.plan import choose_num_groups, expert_epochs, share_out, utilisation
from selfmask_dist.cascade_model import DISPATCHER, expert_name
from selfmask_dist.cascade_stages import Stages, read_sizes
from selfmask_dist.config import Config
from selfmask_dist.life import Life, open_life
from selfmask_dist.parallel import World, join_world
from selfmask_dist.parallel.world import group_of, num_processes
from selfmask_dist.preempt import Preempted, StopRequest
from selfmask_dist.run_directory import create_run_directory, run_path

_POLL_SECONDS = 0.2


class Worlds:
    """The world that this process is in: of all processes, or of its group of them."""

    def __init__(self, config: Config, stack: ExitStack) -> None:
        self._config = config
        self._open = ExitStack()
        self._world: World | None = None
        self._num_groups = 0
        stack.callback(lambda: self._open.close())

    def join(self, num_groups: int = 1) -> World:
        """Leave the world of before where it is another one. Every process calls with the same number."""
        if self._world is None or num_groups != self._num_groups:
            self._open.close()
            section = self._config.engine
            self._world = self._open.enter_context(
                join_world(
                    section.device,
                    threads=section.threads,
                    needs_group=section.name != "ddp",
                    num_groups=num_groups,
                )
            )
            self._num_groups = num_groups
        return self._world


def run_cascade(config: Config, stop: StopRequest, *, is_restart: bool) -> dict[str, Any]:
    """Run a cascade to its end; returns what its `result.json` holds. Every process of the run calls this.

    Raises:
        ValueError: configuration, data or backbone cannot be used, or the router found a cluster too small.
        Preempted: asked to stop; started again, it goes on.
    """
    directory = run_path(config)
    stop_path = directory / f"stop-{os.environ.get('SELFMASK_RESTARTS', 0)}"
    with ExitStack() as stack:
        worlds = Worlds(config, stack)
        world = worlds.join()
        if world.is_main:
            create_run_directory(config, is_restart=is_restart)
            stop_path.unlink(missing_ok=True)
        world.barrier()
        if (directory / "result.json").exists():  # requeued after its end
            finished: dict[str, Any] = json.loads((directory / "result.json").read_text())
            return finished
        _start(config, world, stop)
        _train(dispatcher_config(config), world, stop, parent=directory)
        with open_life(config, directory, world, stop, ends_as="training experts") as life:
            stages = Stages(config, life)
            stages.embed(DISPATCHER)
            stages.route()
            num_groups = _plan_experts(config, life)
        stop.watch(stop_path)
        try:
            _train_experts(config, worlds.join(num_groups), stop, num_groups)
        except Preempted:
            stop_path.touch()  # groups share no step in which they could agree
            raise
        stop.watch(None)
        with open_life(config, directory, worlds.join(), stop) as life:
            return _finish(config, life)


def _start(config: Config, world: World, stop: StopRequest) -> None:
    with open_life(config, run_path(config), world, stop, ends_as="training dispatcher") as life:
        life.writer.event("start", world_size=world.size)
        life.writer.message(f"cascade  {run_path(config)} on {world.size} process(es)")
        stages = Stages(config, life)
        stages.check()
        if config.eval.frozen_baseline:
            stages.embed("frozen")


def _finish(config: Config, life: Life) -> dict[str, Any]:
    stages = Stages(config, life)
    sizes = read_sizes(life.directory)
    for k in range(len(sizes)):
        stages.embed(expert_name(k))
    stages.combine()
    result = {"method": "cascade", "clusters": sizes, **stages.evaluate()}
    result["mask"] = stages.bundle(result["views"])
    stages.draw()
    stages.write_result(result)
    life.writer.event("end", **result)
    return result


# ---- the runs of which a cascade is made


def dispatcher_config(config: Config) -> Config:
    """The dispatcher's run: all of the training images, no measurement at its end."""
    return _changed(config, DISPATCHER, {"eval": {"final": False, "frozen_baseline": False}})


def expert_config(config: Config, k: int, sizes: list[int]) -> Config:
    """An expert's run: its cluster's images, from the dispatcher's scores, as long as the plan says."""
    directory, section = run_path(config), config.cascade
    epochs = expert_epochs(sum(sizes), sizes[k], config.train.epochs, kind=section.expert_epochs)
    longer = epochs / config.train.epochs
    changes: dict[str, dict[str, Any]] = {
        "data": {"subset": str(directory / "router" / f"{expert_name(k)}.npy")},
        "mask": {"init_from": str(directory / DISPATCHER)},
        "train": {"epochs": epochs},
        "optim": {"warmup_epochs": config.optim.warmup_epochs * longer},
        "swav": {"queue_start_epoch": section.expert_queue_start * epochs},
        "eval": {"final": False, "frozen_baseline": False, "knn_every": 0.0},
    }
    return _changed(config, expert_name(k), changes)


def _changed(config: Config, name: str, changes: dict[str, dict[str, Any]]) -> Config:
    values = config.model_dump(mode="json")
    common = {"run": {"dir": str(run_path(config)), "name": name, "overwrite": False, "resume": False}}
    for section, keys in {**changes, **common}.items():
        values[section] = {**values[section], **keys}
    return Config.model_validate({**values, "method": "mask"})


def _train(config: Config, world: World, stop: StopRequest, *, parent: Path) -> None:
    from selfmask_dist.run import run_in  # which imports this module

    run_in(config, world, stop, is_restart=True, parent=parent)


def expert_costs(config: Config, sizes: list[int]) -> list[float]:
    """Steps of each expert."""
    batch = config.train.global_batch_size
    return [
        expert_config(config, k, sizes).train.epochs * np.ceil(size / batch) for k, size in enumerate(sizes)
    ]


def _plan_experts(config: Config, life: Life) -> int:
    """In how many groups the experts train. Equal on every process, and after every restart."""
    sizes = read_sizes(life.directory)
    costs = expert_costs(config, sizes)
    number = 1
    if config.engine.name != "deepspeed":  # which cannot leave a process group and form another
        number = choose_num_groups(
            costs,
            num_processes(),
            config.train.global_batch_size,
            wanted=config.cascade.expert_groups,
        )
    groups = share_out(costs, number)
    life.writer.message(
        f"experts  {len(sizes)} of {', '.join(map(str, sizes))} images; {number} group(s) of "
        f"{num_processes() // number} process(es), busy {utilisation(costs, groups):.0%} of the time: "
        + "; ".join(", ".join(map(str, group)) for group in groups)
    )
    life.writer.event("experts", sizes=sizes, steps=costs, groups=groups)
    return number


def _train_experts(config: Config, world: World, stop: StopRequest, num_groups: int) -> None:
    """This process's group trains its experts, then waits for the others'."""
    directory = run_path(config)
    sizes = read_sizes(directory)
    groups = share_out(expert_costs(config, sizes), num_groups)
    mine = groups[group_of(num_groups)]
    for k in mine:
        # one group speaks for the whole cascade in its status
        _train(expert_config(config, k, sizes), world, stop, parent=directory)
    results = [directory / expert_name(k) / "result.json" for k in range(len(sizes))]
    while not all(path.exists() for path in results):
        if stop.requested:
            raise Preempted
        time.sleep(_POLL_SECONDS)
