"""A moving average of all that a run trains, which stands in its place whenever the run is looked at.

    t <- d t + (1 - d) s     after step n = 0, 1, ...,  with  d = min(decay, (1 + n) / (10 + n))

s are scores under masks, weights in fine-tuning, and heads; the mask that is measured and saved is that of
the averaged scores. Running statistics of normalisation layers are those of training, as in
`torch.optim.swa_utils`. The bound on d is TensorFlow's and timm's: without it a short run would stay near its
start. d is a function of the step, so there is nothing to save but the averages, which checkpoints hold.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from selfmask_dist.parallel import Engine
from selfmask_dist.parallel.moving_average import MovingAverage


class Average:
    """The moving average of what `engine` trains, from its start on. Needs an engine that is started.

    Args:
        decay: share of itself that it keeps at each step (`train.ema`).
    """

    def __init__(self, engine: Engine, decay: float) -> None:
        assert engine.teacher is None, "one moving average at a time"
        self._engine = engine
        self._decay = decay
        # the place of a teacher: state, checkpoints and other world sizes then know it
        self._averages = engine.teacher = MovingAverage(engine.trained, {}, engine.refresh)
        engine.optimizer.register_step_post_hook(lambda *_: self._averages.update())

    def before_step(self, step: int) -> None:
        """Take notice of the step that comes next, from 0."""
        self._averages.momentum = min(self._decay, (1 + step) / (10 + step))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let encoder and heads be the averaged ones inside the context. Collective: all ranks enter."""
        with self._averages():
            yield

    def settle(self) -> None:
        """Leave the averages as what was trained. Collective: every rank must call."""
        with self._averages():
            self._averages.restart()
