"""The engine protocol: how a training step runs on many processes. One file per engine, chosen by
`engine.name`.

An engine gets a module that maps a batch to (its rank's share of the global loss, metrics), and an optimizer.
It knows neither objectives nor architectures.
"""

from typing import Protocol

from torch import Tensor

from selfmask_dist.data import Batch
from selfmask_dist.parallel.world import World


class Engine(Protocol):
    """One training step in two halves, so that the loop can look at the loss before the weights move."""

    world: World

    def forward_backward(self, batch: Batch) -> dict[str, Tensor]:
        """Gradients of the global loss; returns this rank's share of each metric. Collective: every rank must
        call.
        """
        ...

    def step(self) -> None:
        """Clip, step the optimizer, clear gradients. Collective: every rank must call."""
        ...
