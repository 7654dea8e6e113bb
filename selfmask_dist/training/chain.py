"""A run that is made of runs: its stages, each a folder or a file in the run's own, made once.

    chain.train("first", seed=1)           a run of its own in the folder `first`
    chain.once("start.safetensors", fn)    a file that the main process makes
    chain.measure("fit.json", fn)          numbers that all processes measure together

A stage that is there is not made again, so a run that was stopped anywhere goes on where it was. Knows
neither procedures nor cascades.
"""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from torch import Tensor

from selfmask_dist.common.files import replacing, write_json
from selfmask_dist.common.plots import why_no_pictures
from selfmask_dist.config import Config
from selfmask_dist.data import Source
from selfmask_dist.parallel import World
from selfmask_dist.runs.context import RunContext, open_run
from selfmask_dist.runs.folder import run_path
from selfmask_dist.runs.preempt import StopRequest
from selfmask_dist.training.build import build_backbone
from selfmask_dist.training.run import run_in

Tensors = dict[str, Tensor]


class Chain:
    """Makes the stages of one run. Every method is a collective: every rank must call."""

    def __init__(self, config: Config, world: World, stop: StopRequest) -> None:
        self.config = config
        self.folder = run_path(config)
        self._world = world
        self._stop = stop

    def train(
        self, stage: str, *, method: str = "finetune", seed: int | None = None, **changes: dict[str, Any]
    ) -> dict[str, Any]:
        """Train a run in the folder `stage` and return its result; for the arguments see `stage_config`."""
        return self.run(stage_config(self.config, stage, method=method, seed=seed, changes=changes))

    def run(self, config: Config, *, is_part: bool = True) -> dict[str, Any]:
        """Run a stage's configuration to its end and return its result.

        Args:
            is_part: whether the stage's status is shown as this run's status too; not where several stages
                run at the same time.
        """
        parent = self.folder if is_part else None
        return run_in(config, self._world, self._stop, is_restart=True, parent=parent)

    def file(self, name: str, write_fn: Callable[[Path], Any]) -> Path:
        """Have the main process write a file where it is not there yet; return its path.

        Args:
            write_fn: writes the whole file to the path that it gets, which is renamed at the end.
        """
        path = self.folder / name
        if self._world.is_main and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as partial:
                write_fn(partial)
        self._world.barrier()
        return path

    def picture(self, name: str, draw_fn: Callable[[Path], Any]) -> None:
        """Draw a picture as `file` writes one; where nothing can be drawn, say so and leave it out."""
        if reason := why_no_pictures():
            if self._world.is_main:
                print(f"{name} is left out: {reason}", file=sys.stderr)
            return
        self.file(name, draw_fn)

    def once(self, name: str, make_fn: Callable[..., Tensors], *arguments: Any, **options: Any) -> Path:
        """Have the main process make a file of tensors where it is not there yet; return its path."""

        def write(path: Path) -> None:
            tensors = make_fn(*arguments, **options)
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)

        return self.file(name, write)

    def write_subset(self, name: str, is_chosen: npt.NDArray[np.bool_], *, within: str | None) -> str:
        """Write the numbers of the chosen samples to a file, for `data.subset` of a stage; return its path.

        Args:
            within: the procedure's own such file, whose samples `is_chosen` speaks of.
        """
        numbers = np.flatnonzero(is_chosen) if within is None else np.load(within)[is_chosen]

        def write(path: Path) -> None:
            with path.open("wb") as file:  # given a name, numpy would add an ending to it
                np.save(file, numbers)

        return str(self.file(name, write))

    def frozen_backbone(self) -> dict[str, Any]:
        """Return the backbone section's keys by which a stage of any seed has the run's frozen weights."""
        section = self.config.backbone
        if section.pretrained or section.weights is not None:
            return {}
        path = self.once("backbone.safetensors", lambda: build_backbone(self.config).encoder.state_dict())
        return {"weights": str(path), "random": "library"}

    def measure(self, name: str, measure_fn: Callable[[RunContext], dict[str, Any]]) -> dict[str, Any]:
        """Return numbers that all processes measure together, kept in the file `name`."""
        path = self.folder / name
        exists = torch.tensor([float(self._world.is_main and path.exists())], device=self._world.device)
        if not self._world.sum(exists).item():
            with open_run(self.config, self.folder, self._world, self._stop, ends_as="training") as context:
                values = measure_fn(context)
            if self._world.is_main:
                write_json(path, values)
        self._world.barrier()
        found: dict[str, Any] = json.loads(path.read_text())
        return found


def stage_config(
    config: Config,
    stage: str,
    *,
    method: str,
    changes: Mapping[str, Mapping[str, Any]],
    seed: int | None = None,
) -> Config:
    """Return the configuration of a run in the folder `stage` of the run that `config` describes.

    Args:
        changes: by section, the keys that differ from the run's own configuration.
        seed: None for the run's own.
    """
    values = config.model_dump(mode="json")
    common: dict[str, dict[str, Any]] = {
        "run": {"dir": str(run_path(config)), "name": stage, "overwrite": False, "resume": False},
        "eval": {"frozen_baseline": False},
    }
    for section, keys in (*common.items(), *changes.items()):
        values[section] = {**values[section], **keys}
    top = {"method": method, "seed": config.seed if seed is None else seed}
    return type(config).model_validate({**values, **top})


@dataclass(frozen=True)
class Task:
    """Some of the classes: `classes` by number, and the keys of the data section that take their images."""

    name: str
    classes: npt.NDArray[np.int64]
    data: dict[str, str]


def class_tasks(chain: Chain, train: Source, test: Source) -> list[Task]:
    """Return the classes, in their order, as `procedure.tasks` tasks of nearly equal size, larger ones first.

    Raises:
        ValueError: there are fewer classes than tasks.
    """
    number, section = chain.config.procedure.tasks, chain.config.data
    if number > len(train.classes):
        raise ValueError(
            f"procedure.tasks is {number}; data.train has {len(train.classes)} classes to share out"
        )
    own = {"subset": (train, section.subset), "test_subset": (test, section.test_subset)}
    tasks = []
    for index, classes in enumerate(np.array_split(np.arange(len(train.classes)), number), start=1):
        subsets = {
            key: chain.write_subset(f"task-{index}-{key}.npy", np.isin(source.labels, classes), within=within)
            for key, (source, within) in own.items()
        }
        tasks.append(Task(f"task-{index}", classes, subsets))
    return tasks


def other_seed(seed: int, index: int) -> int:
    """Return a seed for stage `index` of several; the first one's is the run's own."""
    return (seed + 1_000_003 * index) % 2**32


def mean_of(results: list[dict[str, float]]) -> dict[str, float]:
    """Return the mean of every measure over stages."""
    return {key: float(np.mean([result[key] for result in results])) for key in results[0]}


def share_of(masks: Tensors) -> float:
    """Return the share of entries that are not zero, over all tensors."""
    return sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values())
