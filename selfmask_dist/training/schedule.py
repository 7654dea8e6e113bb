"""The learning rate as a pure function of the step: linear warm-up, then cosine to zero (or constant).

    f(t) = (t + 1) / w                                 for t < w
    f(t) = (1 + cos(pi * (t - w) / (T - w))) / 2       for w <= t < T

with t the step from 0, w the warm-up steps and T all steps. Every group's learning rate is its base rate
times f(t), so there is no scheduler state to save. Where the head goes first for h steps, all other groups
have 0 until then, and after it the same course over what is left: w and T - h, from step h on.
"""

import math
from dataclasses import dataclass

from torch.optim import Optimizer

HEAD_GROUPS = ("head", "head_scores")


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

    def apply(self, optimizer: Optimizer, step: int) -> None:
        """Set every group's learning rate for `step` from its `base_lr`."""
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * self.factor(step, is_head=group["name"] in HEAD_GROUPS)
