"""The learning rate as a pure function of the step: linear warm-up, then cosine to zero (or constant).

    f(t) = (t + 1) / w                                 for t < w
    f(t) = (1 + cos(pi * (t - w) / (T - w))) / 2       for w <= t < T

with t the step from 0, w the warm-up steps and T all steps. Every group's learning rate is its base rate
times f(t), so there is no scheduler state to save.
"""

import math
from dataclasses import dataclass

from torch.optim import Optimizer


@dataclass(frozen=True)
class Schedule:
    """Learning-rate factor by step.

    Args:
        num_steps: T; training ends there.
        warmup_steps: w.
        kind: `cosine` or `constant` after the warm-up.
    """

    num_steps: int
    warmup_steps: int = 0
    kind: str = "cosine"

    def factor(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.kind == "constant":
            return 1.0
        progress = (step - self.warmup_steps) / max(self.num_steps - self.warmup_steps, 1)
        return (1 + math.cos(math.pi * progress)) / 2

    def apply(self, optimizer: Optimizer, step: int) -> None:
        """Set every group's learning rate for `step` from its `base_lr`."""
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * self.factor(step)
