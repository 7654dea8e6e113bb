"""The teacher: a slow copy of what is trained, in whose place the network computes where an objective asks.

    t <- m t + (1 - m) s     after every step, for each trained tensor s, elementwise on this process's piece

Under masks s are the scores, and theta is materialised from their average; in fine-tuning s are the weights.
There is no second network: within `with teacher():` the averages and what is trained change places in the
same storage, so any module, any engine and any sharding serves both. That costs two rewrites of theta in a
step, and the memory of one more copy of what is trained. Running statistics of normalisation layers change
places too: each network has those that its own forwards moved.

Source: He et al., arXiv 1911.05722 (momentum encoder). Knows neither objectives nor process groups.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from selfmask_dist.parallel.parts import StateSource, TensorPart, TrainedParameter
from selfmask_dist.parallel.world import World


class MovingAverage:
    """A moving average of what is trained; `Engine.keep_teacher` makes it.

    Args:
        trained: what it averages, by name.
        statistics: the network's running statistics, by name; none of these names is among the former.
        refresh: makes the network follow what was written into trained tensors.

    `momentum`: m, 0 ... 1; whoever uses the teacher sets it.
    """

    def __init__(
        self,
        trained: Mapping[str, TrainedParameter],
        statistics: Mapping[str, Tensor],
        refresh: Callable[[], None],
    ) -> None:
        self.momentum = 0.0
        self._trained = dict(trained)
        self._live_statistics = dict(statistics)
        self._refresh = refresh
        self._averages: dict[str, Tensor] = {}
        self._statistics: dict[str, Tensor] = {}
        self.restart()

    def restart(self) -> None:
        """Become a copy of what is trained as it stands."""
        self._averages = {name: one.tensor.detach().clone() for name, one in self._trained.items()}
        self._statistics = {name: buffer.clone() for name, buffer in self._live_statistics.items()}

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Let encoder and heads compute as the teacher's inside the context, where gradients make no sense.

        Collective: every rank must enter and leave.
        """
        self._change_places()
        try:
            yield
        finally:
            self._change_places()

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages by one step."""
        m = self.momentum
        for name, one in self._trained.items():
            average, trained = one.piece(self._averages[name]), one.piece(one.tensor)
            if m == 0:
                average.copy_(trained)
            elif m < 1:
                # not lerp: scores that may never be pruned are infinite, and inf - inf is no number
                average.mul_(m).add_(trained, alpha=1 - m)

    def parts(self, world: World) -> list[TensorPart]:
        """Return this process's parts of averages and statistics as teacher/name, sharing their storage."""
        averages = [
            one.part(f"teacher/{name}", self._averages[name], world) for name, one in self._trained.items()
        ]
        return averages + [
            TensorPart(
                f"teacher/{name}",
                buffer.shape,
                buffer,
                copies=world.size,
                copy=world.rank,
                is_of_first=True,
            )
            for name, buffer in self._statistics.items()
        ]

    def load(self, source: StateSource | None, names: Collection[str], world: World) -> None:
        """Take back what `parts` named, perhaps at another number of ranks; without a source, `restart`.

        Args:
            names: of the averages that the source has.

        Raises:
            ValueError: they differ from what is averaged here.
        """
        if source is None:
            self.restart()
            return
        if odd := sorted(set(names) ^ {*self._trained, *self._statistics}):
            raise ValueError(f"the state's moving averages do not fit what is trained: {odd[:5]}")
        for part in self.parts(world):
            source.read_into(part)

    @torch.no_grad()
    def _change_places(self) -> None:
        for name, one in self._trained.items():
            _swap(one.piece(one.tensor), one.piece(self._averages[name]))
        for name, buffer in self._statistics.items():
            _swap(self._live_statistics[name], buffer)
        self._refresh()
        # autocast keeps bf16 copies of weights: the student would compute with the teacher's, without
        # gradients
        torch.clear_autocast_cache()


def _swap(first: Tensor, second: Tensor) -> None:
    kept = first.clone()
    first.copy_(second)
    second.copy_(kept)
