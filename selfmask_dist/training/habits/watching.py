"""What a run is watched by while it trains, which of its states is kept for it, and when it ends early.

k-NN on the test part, instance retrieval and the validation part are measured; one of the latter two
decides (train.keep_by). The test part decides nothing.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from selfmask_dist import data
from selfmask_dist.config import Config
from selfmask_dist.evals.instance_retrieval import MEASURE
from selfmask_dist.evals.measure import Evaluation
from selfmask_dist.objectives import Objective
from selfmask_dist.training.habits.average import Average
from selfmask_dist.training.retrieval.best_state import BestState

MONITORED = {
    "instance_retrieval": f"monitor/{MEASURE}",
    "accuracy": "validation/accuracy",
    "loss": "validation/loss",
}


def hold_validation(config: Config, train: data.Source) -> tuple[data.Source, data.Source | None]:
    """Return what is left to train on, and the images that `train.validation` asks for."""
    if config.train.validation is None:
        return train, None
    return data.hold_out(train, config.train.validation, setting="train.validation", purpose="validation")


def keeps_by(config: Config) -> str:
    """Return the measure that `train.keep=best` goes by, a key of `MONITORED`."""
    if config.train.keep_by is not None:
        return config.train.keep_by
    if config.train.validation is None:
        return "instance_retrieval"
    return "accuracy" if config.objective.target == "class" else "loss"


def monitor_of(
    evaluation: Evaluation, objective: Objective, average: Average | None, best: BestState | None
) -> Callable[[int], dict[str, Any]]:
    """Return what measures the present state, the averaged one where there is an average, and offers it to
    `best`. Collective: every rank must call it.
    """

    def watch(step: int) -> dict[str, Any]:
        with nullcontext() if average is None else average.in_place():
            values = evaluation.monitor(step) | evaluation.validate(objective)
            if best is not None:
                best.offer(step, values[MONITORED[best.by]])
        return values

    return watch


def finish(
    best: BestState | None,
    average: Average | None,
    evaluation: Evaluation,
    objective: Objective,
    *,
    step: int,
) -> bool:
    """Make what the run leaves the present state, after `step` steps: the best of the measured ones, the last
    one among them, or the average. Return whether the present state changed by it. Collective.
    """
    if best is not None and best.last_step < step:  # the monitor's interval does not divide the training
        with nullcontext() if average is None else average.in_place():
            best.offer(step, _measure(best.by, evaluation, objective))
    if best is not None and best.step < step:
        best.put_back()  # the average begins anew with it
        return True
    if average is not None:
        average.settle()
    return average is not None


def _measure(by: str, evaluation: Evaluation, objective: Objective) -> float:
    if by == "instance_retrieval":
        hits = evaluation.retrieve()
        return sum(hits) / len(hits)
    return evaluation.validate(objective)[MONITORED[by]]
