"""A cascade from one command: masks without labels, of a dispatcher and of one expert for each kind of image.

    frozen embeddings -> dispatcher -> its embeddings -> router -> experts -> their embeddings -> combination
    -> evaluation -> cascade.mask                                   (Warmerdam et al. 2024, section 3.4)

Dispatcher and experts are ordinary runs in folders of their own, with configurations of their own
(`dispatcher/config.yaml`, `expert-0/config.yaml`, ...). Experts train at the same time on groups of
processes. Every stage goes on where it was when the run is started again, and is skipped when it is done. One
part of the cascade can be run by itself: up to the router, one expert, or what comes after the experts. The
stages themselves are in `cascade.stages`.
"""

import json
import os
import re
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from selfmask_dist.cascade.plan import choose_num_groups, expert_epochs, share_out, utilisation
from selfmask_dist.cascade.stages import Stages, read_sizes
from selfmask_dist.common import names
from selfmask_dist.config import Config
from selfmask_dist.parallel import World, join_world
from selfmask_dist.parallel.world import group_of, num_processes
from selfmask_dist.runs.context import RunContext, open_run
from selfmask_dist.runs.folder import create_run_directory, run_path
from selfmask_dist.runs.owner import num_restarts
from selfmask_dist.runs.preempt import Preempted, StopRequest
from selfmask_dist.runs.verdict import closing, judge_cascade
from selfmask_dist.training.chain import Chain, stage_config

_POLL_SECONDS = (0.2, 5.0)  # between two looks for the others' results: at first, and at most
_GIB = 2**30
BytesNeeded = Callable[[Config, int, int], float | None]  # of a number of processes and of training images
_NO_EVALUATION = {"final": False, "frozen_baseline": False}  # views are measured once, at the end


class CurrentWorld:
    """The world that this process is in: of all processes, or of its group of them.

    Args:
        stack: leaves it at its end.
    """

    def __init__(self, config: Config, stack: ExitStack) -> None:
        self._config = config
        self._open = ExitStack()
        self._world: World | None = None
        self._num_groups = 0
        stack.callback(lambda: self._open.close())

    def join(self, num_groups: int = 1) -> World:
        """Return the world of this process's group, and leave the one of before where it is another.

        Every process calls with the same number.
        """
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


def run_cascade(
    config: Config,
    stop: StopRequest,
    *,
    is_restart: bool,
    part: str | None = None,
    bytes_needed_fn: BytesNeeded = lambda *_: None,
) -> dict[str, Any]:
    """Run a cascade to its end and return what its `result.json` holds. Every process of the run calls this.

    Args:
        part: only `router` (and all before it), `expert-K`, or `combination` (and all after it). Returns
            nothing of the router, and the run's result of an expert. An expert that the router did not find
            is no error: where it chooses their number, nobody knows it before.
        bytes_needed_fn: what each process of a group needs while an expert trains.

    Raises:
        ValueError: configuration, data or backbone cannot be used, the router found a cluster too small, or
            the part needs another one first.
        Preempted: asked to stop; started again, it goes on.
    """
    directory = run_path(config)
    stop_path = directory / f"stop-{num_restarts()}"
    with ExitStack() as stack:
        current = CurrentWorld(config, stack)
        world = current.join()
        if part is not None:
            world.from_main(lambda: _check_part(part, directory))
        if world.is_main:
            create_run_directory(config, is_restart=is_restart or part not in (None, names.ROUTER))
        finished = world.from_main(lambda: _finished(directory))
        if finished is not None:  # requeued after its end
            return finished
        if part is not None and part.startswith(names.expert("")):
            return _train_expert(config, int(part.removeprefix(names.expert(""))), world, stop)
        if part != names.COMBINATION:
            if world.is_main:
                stop_path.unlink(missing_ok=True)
            num_groups = _prepare_experts(config, world, stop, bytes_needed_fn)
            if part == names.ROUTER:
                return {}
            world = current.join(num_groups)
            stop.watch(stop_path if world.is_main else None)  # who tells its group in the next vote
            try:
                _train_experts(config, world, stop, num_groups)
            except Preempted:
                if world.is_main:
                    stop_path.touch()  # groups share no step in which they could agree
                raise
            stop.watch(None)
        with open_run(config, directory, current.join(), stop) as context:
            return _finish(config, context)


def _finished(directory: Path) -> dict[str, Any] | None:
    path = directory / names.RESULT
    result: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
    return result


def _check_part(part: str, directory: Path) -> None:
    if part != names.ROUTER and part != names.COMBINATION and not re.fullmatch(names.expert(r"\d+"), part):
        raise ValueError(
            f"a cascade has no part {part!r}; it has {names.ROUTER}, expert-0, ..., {names.COMBINATION}"
        )
    if part != names.ROUTER and not (directory / names.ROUTER / names.CLUSTER_SIZES).exists():
        raise ValueError(f"{directory} has no router yet; run the part {names.ROUTER} first")
    if part == names.COMBINATION:
        experts = [names.expert(k) for k in range(len(read_sizes(directory)))]
        if missing := [name for name in experts if not (directory / name / names.RESULT).exists()]:
            raise ValueError(f"{directory}: {', '.join(missing)} must be trained before they are combined")


def _prepare_experts(config: Config, world: World, stop: StopRequest, bytes_needed_fn: BytesNeeded) -> int:
    """Do everything up to the router; return in how many groups experts train."""
    directory = run_path(config)
    _start(config, world, stop)
    Chain(config, world, stop).run(dispatcher_config(config))
    with open_run(config, directory, world, stop, ends_as="training experts") as context:
        stages = Stages(config, context)
        stages.embed(names.DISPATCHER)
        stages.route()
        return _plan_experts(config, context, bytes_needed_fn)


def _start(config: Config, world: World, stop: StopRequest) -> None:
    with open_run(config, run_path(config), world, stop, ends_as="training dispatcher") as context:
        context.writer.event("start", world_size=world.size)
        context.writer.message(f"cascade  {run_path(config)} on {world.size} process(es)")
        stages = Stages(config, context)
        stages.check()
        if config.eval.frozen_baseline:
            stages.embed("frozen")


def _finish(config: Config, context: RunContext) -> dict[str, Any]:
    stages = Stages(config, context)
    sizes = read_sizes(context.directory)
    for k in range(len(sizes)):
        stages.embed(names.expert(k))
    stages.combine()
    result = {"method": "cascade", "clusters": sizes, **stages.evaluate()}
    result["mask"] = stages.bundle(result["views"])
    stages.draw()
    result["verdict"] = judge_cascade(
        config, result["views"], context.directory, num_test=stages.num_test_images
    )
    stages.write_result(result)
    context.writer.event("end", **result)
    context.writer.message(closing(context.directory, result))
    return result


# ---- the runs of which a cascade is made


def dispatcher_config(config: Config) -> Config:
    """Return the dispatcher's run: all of the training images, no measurement at its end."""
    return stage_config(config, names.DISPATCHER, method="mask", changes={"eval": _NO_EVALUATION})


def expert_config(config: Config, k: int, sizes: list[int]) -> Config:
    """Return an expert's run: its cluster's images, from the dispatcher's scores, as long as planned."""
    directory, section = run_path(config), config.cascade
    epochs = expert_epochs(sum(sizes), sizes[k], config.train.epochs, kind=section.expert_epochs)
    longer = epochs / config.train.epochs
    changes: dict[str, dict[str, Any]] = {
        "data": {"subset": str(directory / names.ROUTER / f"{names.expert(k)}.npy")},
        # a schedule of the kept share is over with the dispatcher: an expert goes on from what it pruned
        "mask": {"init_from": str(directory / names.DISPATCHER), "keep_schedule": "constant"},
        "train": {"epochs": epochs},
        "optim": {"warmup_epochs": config.optim.warmup_epochs * longer, "head_first_epochs": 0.0},
        "swav": {"queue_start_epoch": section.expert_queue_start * epochs},
        "eval": {**_NO_EVALUATION, "knn_every": 0.0},
    }
    return stage_config(config, names.expert(k), method="mask", changes=changes)


def _train_expert(config: Config, k: int, world: World, stop: StopRequest) -> dict[str, Any]:
    """Train one expert by itself; its status is its own, because others may train at the same time."""
    sizes = read_sizes(run_path(config))
    if k >= len(sizes):
        return {}
    return Chain(config, world, stop).run(expert_config(config, k, sizes), is_part=False)


def expert_costs(config: Config, sizes: list[int]) -> list[float]:
    """Return the steps of each expert."""
    batch = config.train.global_batch_size
    return [
        expert_config(config, k, sizes).train.epochs * np.ceil(size / batch) for k, size in enumerate(sizes)
    ]


def _plan_experts(config: Config, context: RunContext, bytes_needed_fn: BytesNeeded) -> int:
    """Return in how many groups the experts train: equal on every process, and after every restart."""
    sizes = read_sizes(context.directory)
    costs = expert_costs(config, sizes)
    number, bound = 1, ""
    if config.engine.name != "deepspeed":  # which cannot leave a process group and form another
        number, bound = context.world.from_main(
            lambda: choose_by_memory(config, sizes, context.world.device, bytes_needed_fn)
        )
    if bound:
        context.writer.event("note", text=bound)
        context.writer.message(f"note     {bound}")
    groups = share_out(costs, number)
    context.writer.message(
        f"experts  {len(sizes)} of {', '.join(map(str, sizes))} images; {number} group(s) of "
        f"{num_processes() // number} process(es), busy {utilisation(costs, groups):.0%} of the time: "
        + "; ".join(", ".join(map(str, group)) for group in groups)
    )
    batch = config.train.global_batch_size
    for k, (size, steps) in enumerate(zip(sizes, costs, strict=True)):
        if size < batch:
            context.writer.message(
                f"WARNING: expert {k} has {size} images, less than a batch of {batch}: {steps:g} steps of a "
                "part of a batch, and no queue. Ask for fewer clusters, or a smaller train.global_batch_size"
            )
    context.writer.event("experts", sizes=sizes, steps=costs, groups=groups)
    return number


def choose_by_memory(
    config: Config, sizes: list[int], device: torch.device, bytes_needed_fn: BytesNeeded
) -> tuple[int, str]:
    """Return the number of groups, and a sentence where memory bounded it or is short; empty elsewhere."""
    section, costs = config.cascade, expert_costs(config, sizes)
    limit = section.memory_gib * _GIB if section.memory_gib else 0.9 * _memory_of(device)
    needs: dict[int, float] = {}

    def has_room(num_processes: int) -> bool:
        needs[num_processes] = bytes_needed_fn(config, num_processes, max(sizes)) or 0.0
        return needs[num_processes] <= limit

    world, batch, wanted = num_processes(), config.train.global_batch_size, section.expert_groups
    number = choose_num_groups(costs, world, batch, wanted=wanted, has_room_fn=has_room)
    if wanted or (number == 1 and needs):
        has_room(world // number)
    short = {size: need for size, need in needs.items() if need > limit}
    if not short:
        return number, ""
    size, need = next(iter(short.items()))
    text = (
        f"an expert on {size} process(es) needs {need / _GIB:.1f} GiB on each, and {limit / _GIB:.1f} GiB "
        f"may be taken"
    )
    if wanted:
        return number, f"{text}: cascade.expert_groups={wanted} may be too many"
    text += f": experts train in {number} group(s) of {world // number}"
    return number, text + ("; that, too, may be short of memory" if world // number in short else "")


def _memory_of(device: torch.device) -> float:
    """Return the bytes of a device; of a CPU this process's share of the machine's."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return whole / int(os.environ.get("LOCAL_WORLD_SIZE", num_processes()))


def _train_experts(config: Config, world: World, stop: StopRequest, num_groups: int) -> None:
    """Train the experts of this process's group, then wait for the others'."""
    directory = run_path(config)
    sizes = read_sizes(directory)
    groups = share_out(expert_costs(config, sizes), num_groups)
    mine = groups[group_of(num_groups)]
    chain = Chain(config, world, stop)
    for k in mine:
        chain.run(expert_config(config, k, sizes))
    _wait_for([directory / names.expert(k) / names.RESULT for k in range(len(sizes))], world, stop)


def _wait_for(paths: Sequence[Path], world: World, stop: StopRequest) -> None:
    """Wait until files are there that other groups of processes write.

    The main rank of a group looks, less and less often, and each look is a vote of its ranks on stopping.
    Collective: every rank of the group must call.

    Raises:
        Preempted: a rank of the group was asked to stop.
    """
    waiting, (pause, longest) = list(paths), _POLL_SECONDS
    while True:
        if world.is_main:
            waiting = [path for path in waiting if not path.exists()]
        votes = torch.tensor([float(stop.requested), float(world.is_main and bool(waiting))])
        is_stopped, is_waiting = world.sum(votes.to(world.device)).tolist()
        if is_stopped:
            raise Preempted
        if not is_waiting:
            return
        until = time.monotonic() + pause
        while time.monotonic() < until and not stop.requested:
            time.sleep(_POLL_SECONDS[0])
        pause = min(1.5 * pause, longest)
