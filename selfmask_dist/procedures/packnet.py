"""PackNet: several tasks in one network, each on weights that the earlier ones left free.

    train the free weights -> keep the largest of them -> the rest is zero -> retrain what is kept -> reserve

A weight has one owner: theta_t = W * 1[1 <= owner <= t]. Task t computes with the weights of all tasks up to
its own, so what comes later never changes it: biases and normalisation are frozen after the first task.
(Mallya, Lazebnik, "PackNet: Adding Multiple Tasks to a Single Network by Iterative Pruning", CVPR 2018,
arXiv 1711.05769, section 3.) The equations come first, as pure functions on tensors by name; the run, which
trains `procedure.tasks` tasks one after the other, is below them.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from selfmask_dist.common import names
from selfmask_dist.masking import select
from selfmask_dist.training.build import build_backbone, open_data
from selfmask_dist.training.chain import Chain, class_tasks, mean_of, share_of
from selfmask_dist.training.hold import FREE, HELD, ZERO, keep_largest

NOBODY = 0
MAX_TASKS = 255

Owners = dict[str, Tensor]
"""{parameter name: uint8 tensor of its shape}: NOBODY, or the task (from 1) that a weight belongs to."""


def packable(model: nn.Module, include: str | Sequence[str] = "auto") -> list[str]:
    """Return the names of the parameters that tasks share: those of `masking.select` with two or more
    dimensions.

    Biases are left out: they are the first task's (section 3 of the paper).
    """
    parameters = dict(model.named_parameters())
    found = [name for name in select(model, include) if parameters[name].ndim > 1]
    if not found:
        raise ValueError(f"include {include!r} names no weights of two or more dimensions to share")
    return found


def no_owners(weights: Mapping[str, Tensor]) -> Owners:
    """Return the owners before the first task: every weight is free."""
    return {name: torch.zeros_like(weight, dtype=torch.uint8) for name, weight in weights.items()}


def train_codes(model: nn.Module, owners: Owners, task: int) -> dict[str, Tensor]:
    """Return the codes (see `training.hold`) of what task `task` trains first: every free weight, and for the
    first task all other parameters of the model too.
    """
    codes = {name: torch.where(owner == NOBODY, FREE, HELD).to(torch.int8) for name, owner in owners.items()}
    return codes if task == 1 else _hold_others(model, codes)


def reserve(weights: Mapping[str, Tensor], owners: Owners, task: int, *, keep: float) -> Owners:
    """Return the owners after task `task` has taken the `keep` largest of each tensor's free weights.

    Raises:
        ValueError: a task below 1 or above 255, one that has weights already, or no free weight left.
    """
    if not 1 <= task <= MAX_TASKS:
        raise ValueError(f"tasks are numbered from 1 to {MAX_TASKS}, got {task}")
    if any(bool((owner == task).any()) for owner in owners.values()):
        raise ValueError(f"task {task} has reserved its weights already")
    free = {name: owner == NOBODY for name, owner in owners.items()}
    if not any(bool(mask.any()) for mask in free.values()):
        raise ValueError(f"no weight is left for task {task}; prune more of the earlier tasks (a lower keep)")
    kept = keep_largest(weights, free, keep)
    return {name: torch.where(kept[name], task, owner).to(torch.uint8) for name, owner in owners.items()}


def retrain_codes(model: nn.Module, owners: Owners, task: int) -> dict[str, Tensor]:
    """Return the codes of what task `task` trains after pruning: its own weights; free weights are zero."""
    codes = {}
    for name, owner in owners.items():
        code = torch.full_like(owner, HELD, dtype=torch.int8)
        code[owner == task] = FREE
        code[owner == NOBODY] = ZERO
        codes[name] = code
    return codes if task == 1 else _hold_others(model, codes)


def stored_bits(owners: Owners, num_tasks: int) -> int:
    """Return the bits that say who owns which weight: the logarithm of the number of tasks, with nobody
    counted as one, for each weight.
    """
    return sum(owner.numel() for owner in owners.values()) * math.ceil(math.log2(num_tasks + 1))


def _hold_others(model: nn.Module, codes: dict[str, Tensor]) -> dict[str, Tensor]:
    others = {
        name: torch.full_like(parameter, HELD, dtype=torch.int8)
        for name, parameter in model.named_parameters()
        if name not in codes
    }
    return {**codes, **others}


# ---- the run

_OWNERS, _CODES = "owners.safetensors", "codes.safetensors"


def run_packnet(chain: Chain) -> dict[str, Any]:
    """Train, prune and retrain every task; `packed.safetensors` holds weights and owners."""
    section, config = chain.config.procedure, chain.config
    train, test = open_data(config)
    tasks = class_tasks(chain, train, test)
    encoder = build_backbone(config).encoder
    owners = no_owners({name: encoder.get_parameter(name) for name in packable(encoder, section.include)})
    weights_path, results, shares = config.backbone.weights, [], []
    for number, task in enumerate(tasks, start=1):
        common: dict[str, Any] = {
            "data": task.data,
            # running statistics are the first task's
            "backbone": {"weights": weights_path, **({"batchnorm": "frozen"} if number > 1 else {})},
        }
        codes = chain.once(f"{task.name}/train-{_CODES}", train_codes, encoder, owners, number)
        chain.train(f"{task.name}-train", **common, procedure={"hold": str(codes)})
        trained = load_file(chain.folder / f"{task.name}-train" / names.ENCODER)
        owners = load_file(
            chain.once(f"{task.name}/{_OWNERS}", reserve, trained, owners, number, keep=section.keep)
        )
        codes = chain.once(f"{task.name}/{_CODES}", retrain_codes, encoder, owners, number)
        result = chain.train(
            f"{task.name}-retrain",
            **common,
            mask={"init_from": str(chain.folder / f"{task.name}-train")},
            procedure={"hold": str(codes)},
            train={"epochs": config.train.epochs * section.retrain},
            # the head has learned by now
            optim={"warmup_epochs": config.optim.warmup_epochs * section.retrain, "head_first_epochs": 0.0},
        )
        weights_path = str(chain.folder / f"{task.name}-retrain" / names.ENCODER)
        results.append(result["adapted"])
        shares.append(share_of({name: owner != NOBODY for name, owner in owners.items()}))
    last = load_file(str(weights_path))
    packed = chain.once(
        "packed.safetensors", dict, {**last, **{f"owners/{name}": owner for name, owner in owners.items()}}
    )
    bits = stored_bits(owners, section.tasks)
    return {
        "tasks": [
            {"classes": [train.classes[c] for c in task.classes], "active": share, **result}
            for task, share, result in zip(tasks, shares, results, strict=True)
        ],
        "adapted": mean_of(results),
        "active": shares[-1],
        "owner_bits": bits,
        "stored_bytes": math.ceil(bits / 8) + sum(t.numel() * t.element_size() for t in last.values()),
        "packed_bytes": packed.stat().st_size,
    }
