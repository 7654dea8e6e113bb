"""The learning rate as a pure function of the step: linear warm-up, then cosine to zero (or constant).

    f(t) = (t + 1) / w                                 for t < w
    f(t) = (1 + cos(pi * (t - w) / (T - w))) / 2       for w <= t < T

with t the step from 0, w the warm-up steps and T all steps. Every group's learning rate is its base rate
times f(t), so there is no scheduler state to save. Where the head goes first for h steps, all other groups
have 0 until then, and after it the same course over what is left: w and T - h, from step h on.
"""

import math
from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer

from selfmask_dist.config import Config

HEAD_GROUPS = ("head", "head_scores")
# optim.score_reach=auto, by the kind of network; docs/unlabelled.md has what was measured
REACH = {
    "no convolutional network": 1.2,
    "a convolutional network": 0.4,
    "a convolutional network with depthwise convolutions": 0.15,
}


@dataclass(frozen=True)
class Schedule:
    """Learning-rate factor by step.

    Args:
        num_steps: T; training ends there.
        warmup_steps: w.
        kind: `cosine` or `constant` after the warm-up.
        head_first_steps: h; the backbone's groups wait so long.
    """

    num_steps: int
    warmup_steps: int = 0
    kind: str = "cosine"
    head_first_steps: int = 0

    def factor(self, step: int, *, is_head: bool = True) -> float:
        """Return f(step), of the head's groups or of all others."""
        first = 0 if is_head else self.head_first_steps
        if step < first:
            return 0.0
        done, total = step - first, self.num_steps - first
        if done < self.warmup_steps:
            return (done + 1) / self.warmup_steps
        if self.kind == "constant":
            return 1.0
        progress = (done - self.warmup_steps) / max(total - self.warmup_steps, 1)
        return (1 + math.cos(math.pi * progress)) / 2

    def travel(self, momentum: float) -> float:
        """Return how far SGD at a base rate of 1 carries a number of the backbone's groups whose gradient is
        1 in every step: sum_t f(t) * (1 - m^(t + 1)) / (1 - m).
        """
        built_up = (
            self.factor(step, is_head=False) * (1 - momentum ** (step + 1)) for step in range(self.num_steps)
        )
        return sum(built_up) / (1 - momentum)

    def apply(self, optimizer: Optimizer, step: int) -> None:
        """Set every group's learning rate for `step` from its `base_lr`."""
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * self.factor(step, is_head=group["name"] in HEAD_GROUPS)


def with_reached_rate(config: Config, schedule: Schedule, encoder: nn.Module) -> tuple[Config, str]:
    """Return the configuration with the rate that `optim.score_reach` stands for, and a line for the user;
    itself and no line where that is null.

    With it a gradient of one size and one sign carries a score reach * (way from `mask.init` to
    `mask.threshold`) in the whole training.
    """
    optim = config.optim
    if optim.score_reach is None or config.method != "mask":
        return config, ""
    kind = _kind(encoder)
    reach = REACH[kind] if optim.score_reach == "auto" else optim.score_reach
    travel = schedule.travel(optim.momentum)
    if not travel:
        raise ValueError("optim.head_first_epochs leaves the scores no step of train.epochs; lower it")
    rate = reach * config.mask.way_to_threshold / travel
    line = (
        f"rate     {rate:.3g} for the scores: {schedule.num_steps:,} steps can carry one {reach:g} times the "
        f"way to its threshold{f' ({kind})' if optim.score_reach == 'auto' else ''}"
    )
    return config.model_copy(update={"optim": optim.model_copy(update={"score_lr": rate})}), line


def _kind(encoder: nn.Module) -> str:
    """Return the key of `REACH` by what holds most weights: convolutions, some of them depthwise, or not."""
    convolutions = linears = 0
    is_depthwise = False
    for module in encoder.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            convolutions += module.weight.numel()
            is_depthwise |= 1 < module.groups == module.in_channels
        elif isinstance(module, nn.Linear | nn.MultiheadAttention):
            linears += sum(parameter.numel() for parameter in module.parameters(recurse=False))
    if convolutions <= linears:
        return "no convolutional network"
    return "a convolutional network" + (" with depthwise convolutions" if is_depthwise else "")
