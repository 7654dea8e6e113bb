"""PackNet: several tasks in one network, each on weights that the earlier ones left free.

    train the free weights -> keep the largest of them -> the rest is zero -> retrain what is kept -> reserve

A weight has one owner: theta_t = W * 1[1 <= owner <= t]. Task t computes with the weights of all tasks up to
its own, so what comes later never changes it: biases and normalisation are frozen after the first task.
(Mallya, Lazebnik, "PackNet: Adding Multiple Tasks to a Single Network by Iterative Pruning", CVPR 2018,
arXiv 1711.05769, section 3.) Pure functions on tensors by name; knows no files and no training loop.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from selfmask_dist.masking import select
from selfmask_dist.masking.reading import norm_statistics
from selfmask_dist.training.hold import FREE, HELD, ZERO, Codes, keep_largest

NOBODY = 0
MAX_TASKS = 255

Owners = dict[str, Tensor]
"""{parameter name: uint8 tensor of its shape}: NOBODY, or the task (from 1) that a weight belongs to."""

TrainFn = Callable[[int, str, Codes], None]
"""(task, "train" or "retrain", codes): trains the model under `hold.Hold(model, codes)`; normalisation
statistics move in the first task only."""


def packable(model: nn.Module, include: str | Sequence[str] = "auto") -> list[str]:
    """Names of the parameters that tasks share: those of `masking.select` with two or more dimensions.

    Biases are left out: they are the first task's (section 3 of the paper).
    """
    parameters = dict(model.named_parameters())
    names = [name for name in select(model, include) if parameters[name].ndim > 1]
    if not names:
        raise ValueError(f"include {include!r} names no weights of two or more dimensions to share")
    return names


def nobodys(weights: Mapping[str, Tensor]) -> Owners:
    """Owners before the first task."""
    return {name: torch.zeros_like(weight, dtype=torch.uint8) for name, weight in weights.items()}


def train_codes(model: nn.Module, owners: Owners, task: int) -> dict[str, Tensor]:
    """What task `task` trains first: all that is free; of the first task all parameters of the model."""
    codes = {name: torch.where(owner == NOBODY, FREE, HELD).to(torch.int8) for name, owner in owners.items()}
    return codes if task == 1 else _hold_others(model, codes)


def reserve(weights: Mapping[str, Tensor], owners: Owners, task: int, *, keep: float) -> Owners:
    """Owners after task `task` has taken the `keep` largest of each tensor's free weights.

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
    """What task `task` trains after pruning: its own weights; what is free is zero."""
    codes = {}
    for name, owner in owners.items():
        code = torch.full_like(owner, HELD, dtype=torch.int8)
        code[owner == task] = FREE
        code[owner == NOBODY] = ZERO
        codes[name] = code
    return codes if task == 1 else _hold_others(model, codes)


def view(weights: Mapping[str, Tensor], owners: Owners, task: int) -> dict[str, Tensor]:
    """theta_t: the weights of tasks 1 to `task`; all others are zero."""
    return {
        name: torch.where((owner != NOBODY) & (owner <= task), weights[name], 0)
        for name, owner in owners.items()
    }


def stored_bits(owners: Owners, num_tasks: int) -> int:
    """Bits to say who owns which weight: each takes the logarithm of the number of tasks, and nobody."""
    return sum(owner.numel() for owner in owners.values()) * math.ceil(math.log2(num_tasks + 1))


@dataclass
class Packed:
    """One network that holds several tasks.

    weights: of all tasks; owners: of them; shared: what only the first task trained (biases, normalisation
    with its statistics).
    """

    weights: dict[str, Tensor]
    owners: Owners
    shared: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def apply(self, model: nn.Module, task: int) -> None:
        """Make `model` compute as task `task` did when it was reserved, to the bit."""
        if not any(bool((owner == task).any()) for owner in self.owners.values()):
            raise ValueError(f"there is no task {task} in these owners")
        tensors = model.state_dict()
        for name, tensor in {**self.shared, **view(self.weights, self.owners, task)}.items():
            tensors[name].copy_(tensor)


@torch.no_grad()
def pack(
    model: nn.Module,
    tasks: Iterable[int],
    train_fn: TrainFn,
    *,
    keep: float = 0.5,
    include: str | Sequence[str] = "auto",
) -> Packed:
    """Train tasks 1, 2, ... one after the other into `model`, which ends as the last one.

    Args:
        train_fn: see `TrainFn`; heads are its own.
        keep: share of the free weights that a task reserves. The paper prunes 0.5 to 0.75 of them.
    """
    names = packable(model, include)
    owners = nobodys({name: model.get_parameter(name) for name in names})
    for task in tasks:
        with torch.enable_grad():
            train_fn(task, "train", train_codes(model, owners, task))
        owners = reserve({name: model.get_parameter(name) for name in names}, owners, task, keep=keep)
        with torch.enable_grad():
            train_fn(task, "retrain", retrain_codes(model, owners, task))
    weights = {name: model.get_parameter(name).detach().clone() for name in names}
    statistics = dict(norm_statistics(model))
    others = {name: p for name, p in model.named_parameters() if name not in weights}
    shared = {name: tensor.detach().clone() for name, tensor in {**others, **statistics}.items()}
    return Packed(weights, owners, shared)


def _hold_others(model: nn.Module, codes: dict[str, Tensor]) -> dict[str, Tensor]:
    others = {
        name: torch.full_like(parameter, HELD, dtype=torch.int8)
        for name, parameter in model.named_parameters()
        if name not in codes
    }
    return {**codes, **others}
