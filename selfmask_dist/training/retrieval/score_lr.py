"""The learning rate of the scores, chosen without labels among `optim.score_lr_choices`.

    trial-RATE/      for each rate a run of a tenth of the training, from the same start with the same seed
    score_lr.json    {"score_lr", "trials": [{"score_lr", "instance_retrieval"}, ...]}

The rate with the highest instance retrieval is taken; where the middle of the choices lies within one paired
standard error of it, that one, as the highest of several that tie is chosen by luck. A trial's rate goes
through its whole course, warm-up and cosine, in its tenth; lengths in the objective's section stay as they
are. A trial whose loss, scores or embeddings stop being finite has retrieved nothing.

A trial is a run of its own and made once: a run that was stopped goes on within the trial where it stood.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from selfmask_dist.common import names
from selfmask_dist.common.files import write_json
from selfmask_dist.config import Config
from selfmask_dist.evals.embed import NonFiniteEmbeddingsError
from selfmask_dist.evals.instance_retrieval import MEASURE, compare
from selfmask_dist.parallel import World
from selfmask_dist.training.meter import NonFiniteError
from selfmask_dist.training.retrieval.record import read_hits

SHARE = 0.1  # of the training, that each trial takes
Hits = Sequence[int]


def with_chosen_score_lr(
    config: Config, world: World, *, train_fn: Callable[[Config], Any]
) -> tuple[Config, dict[str, Any]]:
    """Return the configuration with the chosen rate, and the entry of `result.json` that says how it was
    chosen, which is empty where there is nothing to choose. Collective: every rank must call.

    Args:
        train_fn: runs a trial's configuration to its end, in its folder.
    """
    rates = config.optim.score_lr_choices
    if config.method != "mask" or rates is None:
        return config, {}
    folder = Path(config.run.dir) / config.run.name
    known = torch.tensor([float(world.is_main and (folder / names.SCORE_LR).exists())], device=world.device)
    if not world.sum(known).item():
        hits = {rate: _try(trial_config(config, rate), train_fn) for rate in rates}
        if world.is_main:
            write_json(folder / names.SCORE_LR, _choice(hits))
    world.barrier()
    choice = json.loads((folder / names.SCORE_LR).read_text())
    optim = config.optim.model_copy(update={"score_lr": choice["score_lr"], "score_lr_choices": None})
    return config.model_copy(update={"optim": optim}), {"score_lr": choice}


def trial_config(config: Config, rate: float) -> Config:
    """Return the configuration of a rate's trial: a tenth of the training, then instance retrieval."""
    values = config.model_dump(mode="json")
    train, optim = config.train, config.optim
    changes: dict[str, dict[str, Any]] = {
        "run": {
            "dir": str(Path(config.run.dir) / config.run.name),
            "name": names.trial(f"{rate:g}"),
            "overwrite": False,
            "resume": False,
        },
        # without a test split nothing else is measured
        "data": {"test": None, "test_subset": None},
        "eval": {"frozen_baseline": False, "final": True, "knn_every": 0.0},
        "train": {
            "epochs": train.epochs * SHARE,
            "max_steps": None if train.max_steps is None else math.ceil(train.max_steps * SHARE),
            "keep": "last",
            "keep_by": None,
            "patience": None,
        },
        "optim": {
            "score_lr": rate,
            "score_lr_choices": None,
            "score_reach": None,
            "warmup_epochs": optim.warmup_epochs * SHARE,
            "head_first_epochs": optim.head_first_epochs * SHARE,
        },
    }
    for section, keys in changes.items():
        values[section] = {**values[section], **keys}
    return type(config).model_validate(values)


def _try(config: Config, train_fn: Callable[[Config], Any]) -> Hits:
    """Return the hits of a trial, which may have finished before; none of an encoder that was destroyed."""
    try:
        train_fn(config)
    except (NonFiniteError, NonFiniteEmbeddingsError):
        return ()
    return read_hits(Path(config.run.dir) / config.run.name)["adapted"]


def choose(hits: Mapping[float, Hits]) -> float:
    """Return the rate with the most hits, or the middle one where it lies within a paired standard error.

    Args:
        hits: of each rate, in ascending order, on the same pictures; none where its trial failed.

    Raises:
        ValueError: every trial failed.
    """
    rates = [rate for rate in hits if hits[rate]]
    if not rates:
        raise ValueError(
            f"with none of optim.score_lr_choices={[*hits]} was training finite for a tenth of its length; "
            "choose smaller rates, or look at the data"
        )
    best = max(rates, key=lambda rate: sum(hits[rate]))
    middle = [*hits][len(hits) // 2]
    if middle in rates and middle != best:
        found = compare([bool(hit) for hit in hits[middle]], [bool(hit) for hit in hits[best]])
        if found.difference <= found.standard_error:
            return middle
    return best


def describe_choice(choice: Mapping[str, Any]) -> str:
    """Return a choice in words: the rate, and the instance retrieval of each."""
    found = choice["score_lr"]
    tried = ", ".join(f"{trial['score_lr']:g} {trial[MEASURE]:.3f}" for trial in found["trials"])
    return f"{found['score_lr']:g}, chosen by the instance retrieval after a tenth of the training: {tried}"


def _choice(hits: Mapping[float, Hits]) -> dict[str, Any]:
    trials = [
        {"score_lr": rate, MEASURE: sum(found) / len(found) if found else 0.0} for rate, found in hits.items()
    ]
    return {"score_lr": choose(hits), "trials": trials}
