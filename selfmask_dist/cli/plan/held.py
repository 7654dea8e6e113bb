"""The bytes of a masked weight by what weights, scores and momentum are held in (`engine.weights`, ...).

                              W + theta   scores   momentum   gradients at the end of backward
    all in float32                8          4        4          4
    engine.weights=bf16           4          4        4          2; one tensor's, where they step in backward
    engine.momentum=bf16                              2
    engine.scores=bf16                       2

AdamW's momentum is two numbers; a teacher adds an average. A tensor that is stepped needs 14 bytes for each
of its weights while it is: its gradients in both dtypes, and G, W and momentum in float32.
"""

from dataclasses import dataclass

from selfmask_dist.cli.plan.model_size import ModelSize
from selfmask_dist.config import Config
from selfmask_dist.config.objectives import WITH_TEACHER

FULL, HALF = 4.0, 2.0
_OF_ONE_TENSOR = 14.0


@dataclass(frozen=True)
class Held:
    """Bytes for each number: of the frozen weight and of theta, of a score, of all moments of one score."""

    weight: float
    score: float
    moments: float

    @property
    def state(self) -> float:
        """Bytes of a checkpoint for each masked weight."""
        return self.score + self.moments


def held_by(config: Config) -> Held:
    """Return what a configuration holds numbers in."""
    engine, is_adamw = config.engine, config.optim.kind == "adamw"
    score = HALF if engine.scores == "bf16" else FULL
    moment = HALF if engine.momentum == "bf16" else FULL
    has_average = config.objective.name in WITH_TEACHER or config.train.ema is not None
    average = score if has_average else 0.0
    weight = HALF if engine.weights == "bf16" else FULL
    return Held(weight, score, (2 if is_adamw else 1) * moment + average)


def gradient_bytes(size: ModelSize, config: Config, *, world_size: int) -> float | None:
    """Return what gradients take at most under engine.weights=bf16; None where weights are float32."""
    optim, n = config.optim, size.masked
    if config.engine.weights != "bf16":
        return None
    if optim.clip_norm is not None and optim.score_step == "plain":
        return (HALF + FULL) * n
    one = _OF_ONE_TENSOR * max((numbers for _, numbers in size.shapes), default=0)
    is_in_backward = world_size == 1 and config.train.accumulate == 1 and optim.score_step == "plain"
    return one if is_in_backward else HALF * n + one
