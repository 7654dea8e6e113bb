"""The teacher: a slow copy of what is trained, in whose place the network computes where an objective asks.

    t <- m t + (1 - m) s     after every step, for each trained tensor s, elementwise on this process's piece

Under masks s are the scores, and theta is materialised from their average; in fine-tuning s are the weights.
There is no second network: within `with teacher():` the averages and what is trained change places in the
same storage, so any module, any engine and any sharding serves both. That costs two rewrites of theta in a
step, and the memory of one more copy of what is trained. Running statistics of normalisation layers change
places too: each network has those that its own forwards moved.

Source: He et al., arXiv 1911.05722 (momentum encoder). Knows neither objectives nor process groups.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from selfmask_dist.parallel.trained import TrainedParameter


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

    def state(self) -> dict[str, Tensor]:
        """Return averages and statistics, whole and on the CPU, by name. Collective: every rank must call."""
        averages = {name: one.whole(self._averages[name]) for name, one in self._trained.items()}
        return averages | {name: buffer.cpu().clone() for name, buffer in self._statistics.items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave, perhaps at another number of ranks; from an empty one, `restart`.

        Raises:
            ValueError: names differ from what is averaged here.
        """
        if not state:
            self.restart()
            return
        if odd := sorted(set(state) ^ {*self._trained, *self._statistics}):
            raise ValueError(f"the state's moving averages do not fit what is trained: {odd[:5]}")
        for name, one in self._trained.items():
            one.fill(self._averages[name], state[name])
        for name, buffer in self._statistics.items():
            buffer.copy_(state[name])

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
