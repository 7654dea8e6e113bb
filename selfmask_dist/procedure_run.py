"""PackNet, lottery tickets and Knowledge Evolution from one command: chains of trainings.

    packnet    for each task: train free weights -> prune, reserve -> retrain           packed.safetensors
    lottery    k steps, then for each round: train from step k -> prune                 ticket.safetensors
    evolution  for each generation: train -> keep the fit half, renew the rest          fit.safetensors

Each training is an ordinary `method=finetune` run in a folder of its own. What happens between two of them
is a pure function of `procedures` from files to a file. Every stage goes on where it was when the run is
started again, and is skipped when it is done.
"""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from selfmask_dist.adapt import format_numbers
from selfmask_dist.assembly import build_backbone, open_data
from selfmask_dist.config import Config
from selfmask_dist.evaluation import Evaluation
from selfmask_dist.life import Life, open_life
from selfmask_dist.parallel import World, join_world
from selfmask_dist.preempt import StopRequest
from selfmask_dist.procedures import knowledge_evolution, lottery, packnet, slim, wise_ft
from selfmask_dist.run_directory import create_run_directory, run_path, write_json

Tensors = dict[str, Tensor]
_OWNERS, _CODES, _ENCODER = "owners.safetensors", "codes.safetensors", "encoder.safetensors"


def run_procedure(config: Config, stop: StopRequest, *, is_restart: bool) -> dict[str, Any]:
    """Run a procedure to its end; returns what its `result.json` holds. Every process of the run calls this.

    Raises:
        ValueError: configuration, data or backbone cannot be used.
        Preempted: asked to stop; started again, it goes on.
    """
    section = config.engine
    with join_world(section.device, threads=section.threads, needs_group=False) as world:
        directory = run_path(config)
        if world.is_main:
            create_run_directory(config, is_restart=is_restart)
        world.barrier()
        path = directory / "result.json"
        if not path.exists():
            chain = Chain(config, world, stop)
            result = {"method": config.method} | _PROCEDURES[config.method](chain)
            with open_life(config, directory, world, stop) as life:
                if world.is_main:
                    write_json(path, result)
                world.barrier()
                life.writer.event("end", **result)
                life.writer.message(f"{config.method}: {format_numbers(result['adapted'])}")
        finished: dict[str, Any] = json.loads(path.read_text())
        return finished


class Chain:
    """The stages of one procedure, each a folder in the run's own. Every method is a collective."""

    def __init__(self, config: Config, world: World, stop: StopRequest) -> None:
        self.config = config
        self.folder = run_path(config)
        self._world = world
        self._stop = stop

    def train(self, stage: str, **changes: dict[str, Any]) -> dict[str, Any]:
        """A finetune run in the folder `stage`; returns its result.

        Args:
            changes: by section, the keys that differ from the procedure's own configuration.
        """
        from selfmask_dist.run import run_in  # which imports this module

        values = self.config.model_dump(mode="json")
        common: dict[str, dict[str, Any]] = {
            "run": {"dir": str(self.folder), "name": stage, "overwrite": False, "resume": False},
            "eval": {"frozen_baseline": False},
        }
        for section, keys in (*common.items(), *changes.items()):
            values[section] = {**values[section], **keys}
        stage_config = type(self.config).model_validate({**values, "method": "finetune"})
        return run_in(stage_config, self._world, self._stop, is_restart=True, parent=self.folder)

    def once(self, name: str, make_fn: Callable[..., Tensors], *arguments: Any, **options: Any) -> Path:
        """A file of tensors that the main process makes where it is not there yet; its path."""
        path = self.folder / name
        if self._world.is_main and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.partial")
            tensors = make_fn(*arguments, **options)
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, partial)
            partial.rename(path)
        self._world.barrier()
        return path

    def places(self, name: str, is_chosen: npt.NDArray[np.bool_]) -> str:
        """A file with the numbers of the chosen samples; its path."""
        path = self.folder / name
        if self._world.is_main:
            np.save(path, np.flatnonzero(is_chosen))
        self._world.barrier()
        return str(path)

    def measure(self, name: str, measure_fn: Callable[[Life], dict[str, float]]) -> dict[str, float]:
        """Numbers that all processes measure together, kept in a file."""
        path = self.folder / name
        exists = torch.tensor([float(self._world.is_main and path.exists())], device=self._world.device)
        if not self._world.sum(exists).item():
            with open_life(self.config, self.folder, self._world, self._stop, ends_as="training") as life:
                values = measure_fn(life)
            if self._world.is_main:
                write_json(path, values)
        self._world.barrier()
        found: dict[str, float] = json.loads(path.read_text())
        return found


# ---- PackNet


def run_packnet(chain: Chain) -> dict[str, Any]:
    """Tasks 1 to `procedure.tasks` in one network; `packed.safetensors` holds weights and owners."""
    section, config = chain.config.procedure, chain.config
    train, test = open_data(config)
    groups = np.array_split(np.arange(len(train.classes)), section.tasks)
    if section.tasks > len(train.classes):
        raise ValueError(
            f"procedure.tasks is {section.tasks}; data.train has {len(train.classes)} classes to share out"
        )
    encoder = build_backbone(config).encoder
    names = packnet.packable(encoder, section.include)
    owners = packnet.nobodys({name: encoder.get_parameter(name) for name in names})
    weights_path, tasks = config.backbone.weights, []
    for task, classes in enumerate(groups, start=1):
        places = {}
        for key, source in (("subset", train), ("test_subset", test)):
            places[key] = chain.places(f"task-{task}-{key}.npy", np.isin(source.labels, classes))
        common: dict[str, Any] = {
            "data": places,
            # statistics are the first task's
            "backbone": {"weights": weights_path, **({"batchnorm": "frozen"} if task > 1 else {})},
        }
        codes = chain.once(f"task-{task}/train-{_CODES}", packnet.train_codes, encoder, owners, task)
        chain.train(f"task-{task}-train", **common, procedure={"hold": str(codes)})
        trained = load_file(chain.folder / f"task-{task}-train" / _ENCODER)
        owners = load_file(
            chain.once(f"task-{task}/{_OWNERS}", packnet.reserve, trained, owners, task, keep=section.keep)
        )
        codes = chain.once(f"task-{task}/{_CODES}", packnet.retrain_codes, encoder, owners, task)
        result = chain.train(
            f"task-{task}-retrain",
            **common,
            mask={"init_from": str(chain.folder / f"task-{task}-train")},
            procedure={"hold": str(codes)},
            train={"epochs": config.train.epochs * section.retrain},
            optim={"warmup_epochs": config.optim.warmup_epochs * section.retrain},
        )
        weights_path = str(chain.folder / f"task-{task}-retrain" / _ENCODER)
        names_of = [train.classes[c] for c in classes]
        share = _share({name: owner != packnet.NOBODY for name, owner in owners.items()})
        tasks.append({"classes": names_of, "active": share, **result["adapted"]})
    last = load_file(str(weights_path))
    packed = chain.once(
        "packed.safetensors", dict, {**last, **{f"owners/{name}": owner for name, owner in owners.items()}}
    )
    bits = packnet.stored_bits(owners, section.tasks)
    measures = [key for key, value in tasks[0].items() if isinstance(value, float) and key != "active"]
    return {
        "tasks": tasks,
        "adapted": {key: float(np.mean([task[key] for task in tasks])) for key in measures},
        "active": tasks[-1]["active"],
        "owner_bits": bits,
        "stored_bytes": math.ceil(bits / 8) + sum(t.numel() * t.element_size() for t in last.values()),
        "packed_bytes": packed.stat().st_size,
    }


# ---- lottery tickets


def run_lottery(chain: Chain) -> dict[str, Any]:
    """Rounds of training and pruning; `ticket.safetensors` holds the last mask's start, w_k * m."""
    section, config = chain.config.procedure, chain.config
    encoder = build_backbone(config).encoder
    names = packnet.packable(encoder, section.include)
    start: dict[str, Any] = {}
    if section.rewind_steps:
        chain.train(
            "rewind",
            train={"max_steps": section.rewind_steps},
            eval={"frozen_baseline": False, "final": False, "knn_every": 0.0},
        )
        start = {"start_from": str(chain.folder / "rewind")}
    mask, rounds = lottery.whole({name: encoder.get_parameter(name) for name in names}), []
    for index in range(section.rounds + 1):
        codes = chain.once(f"round-{index}-{_CODES}", lottery.codes, mask)
        result = chain.train(f"round-{index}", procedure={"hold": str(codes), **start})
        rounds.append({"left": _share(mask), **result["adapted"]})
        if index < section.rounds:
            end = load_file(chain.folder / f"round-{index}" / _ENCODER)
            mask = lottery.prune(end, mask, section.prune, scope=section.scope)
    at_k = load_file(chain.folder / "rewind" / _ENCODER) if start else encoder.state_dict()
    chain.once("ticket.safetensors", lottery.rewind, at_k, mask)
    total = sum(kept.numel() for kept in mask.values())
    num_kept = sum(int(kept.sum()) for kept in mask.values())
    others = sum(p.numel() for p in encoder.parameters()) - total
    return {
        "rounds": rounds,
        "adapted": {key: value for key, value in rounds[-1].items() if key != "left"},
        "active": (num_kept + others) / (total + others),
        # a bit for each weight, and the values of those that are left
        "stored_bytes": math.ceil(total / 8) + 4 * (num_kept + others),
    }


# ---- Knowledge Evolution


def run_evolution(chain: Chain) -> dict[str, Any]:
    """Generations of trainings; `fit.safetensors` holds the last one's fit half (kels: a slim network)."""
    section, config = chain.config.procedure, chain.config
    encoder = build_backbone(config).encoder
    if section.split == "kels":
        split = knowledge_evolution.kels(encoder, section.split_rate)
    else:
        names = packnet.packable(encoder, section.include)
        weights = {name: encoder.get_parameter(name) for name in names}
        split = knowledge_evolution.wels(weights, section.split_rate, seed=config.seed)
    weights_path, generations = config.backbone.weights, []
    last: Tensors = {}
    for index in range(section.generations):
        if index:
            path = chain.once(
                f"generation-{index}-start.safetensors",
                knowledge_evolution.evolve,
                last,
                _fresh(config, index),
                split,
            )
            weights_path = str(path)
        result = chain.train(f"generation-{index}", backbone={"weights": weights_path})
        last = load_file(chain.folder / f"generation-{index}" / _ENCODER)
        generations.append(result["adapted"])
    wise_ft.write(encoder, last)
    fit = encoder
    if section.split == "kels":
        fit = slim.extract(encoder, section.split_rate)
    else:
        wise_ft.write(fit, knowledge_evolution.fit(last, split))
    chain.once("fit.safetensors", fit.state_dict)
    size = build_backbone(config).spec.preprocessing.image_size
    values = chain.measure("fit.json", lambda life: _measure_fit(config, life, fit))
    costs = {
        name: {"parameters": found.parameters, "operations": found.operations}
        for name, found in (("dense", slim.cost(encoder, size)), ("fit", slim.cost(fit, size)))
        if section.split == "kels"
    }
    return {
        "generations": generations,
        "adapted": generations[-1],
        "fit": values,
        "costs": costs,
        "stored_bytes": sum(4 * p.numel() for p in encoder.parameters()),
    }


def _fresh(config: Config, generation: int) -> Tensors:
    """Random weights of the same architecture, other ones for each generation."""
    values = config.model_dump(mode="json")
    values["backbone"] = {**values["backbone"], "pretrained": False, "weights": None}
    values["seed"] = (config.seed + 1_000_003 * generation) % 2**32
    return dict(build_backbone(type(config).model_validate(values)).encoder.state_dict())


def _measure_fit(config: Config, life: Life, fit: torch.nn.Module) -> dict[str, float]:
    backbone = build_backbone(config)
    backbone.encoder = fit.to(life.world.device).eval()
    with torch.no_grad():
        size = backbone.spec.preprocessing.image_size
        dim = backbone.encoder(torch.zeros(1, 3, size, size, device=life.world.device)).shape[1]
    backbone.spec = replace(backbone.spec, dim=dim)
    train, test = open_data(config)
    evaluation = Evaluation(config, backbone, train, test, life.world, on_batch=life.check)
    return evaluation.full(probe=config.eval.probe)


def _share(masks: Tensors) -> float:
    return sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values())


_PROCEDURES: dict[str, Callable[[Chain], dict[str, Any]]] = {
    "packnet": run_packnet,
    "lottery": run_lottery,
    "evolution": run_evolution,
}
