"""Learning rates of the rows: where tuning starts, how it goes on, and what it chose.

Each row has one line to search along: all rates under which its encoder (or, where that is fixed, its head)
is trained, times one factor. Every row gets the same number of tries on it, on images held out from the
training ones, so no test image has a say. `rates.json` holds what came out, written by
`benchmarks/methods.py --tune`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CHOSEN = Path(__file__).with_name("rates.json")
FACTORS = (0.2, 1.0, 5.0, 25.0)

_SCORE, _WEIGHT, _HEAD = "optim.score_lr", "optim.weight_lr", "optim.head_lr"
_SCORES = {_SCORE: 100.0}
_WEIGHTS = {_WEIGHT: 0.01}
_ADAMW = {_WEIGHT: 0.005}
_BOTH = {_SCORE: 10.0, _WEIGHT: 0.01}
_CHAIN = {_WEIGHT: 0.05}

# rates of another setting, relative to `STARTS`, for rows that are not tuned there
CARRIED = {"groceries": {_SCORE: 0.1, _WEIGHT: 0.2, _HEAD: 1.0}}

MEANS_THE_SAME = ("nbd",)  # in every setting: rates of score_step=rms

# the middle of each row's line; rows that train nothing are not here
STARTS: dict[str, dict[str, float]] = {
    "finetune_sgd": _WEIGHTS,
    "finetune_adamw": {_WEIGHT: 0.001},
    "finetune_frozen_embedding": _WEIGHTS,
    "finetune_bias": _ADAMW,
    "finetune_norm": _ADAMW,
    "lora": _ADAMW,
    "threshold": _SCORES,
    "piggyback": {_SCORE: 0.5},
    "edge_popup": _SCORES,
    "edge_popup_global": _SCORES,
    "edge_popup_random": {_SCORE: 1.0},
    "edge_popup_kaiming": {_SCORE: 1.0},
    "topk": _SCORES,
    "progressive": _SCORES,
    "random_mask": {_HEAD: 0.05},
    "magnitude_mask": {_HEAD: 0.05},
    "first_layers": _SCORES,
    "layers_by_name": _SCORES,
    "maskable": _SCORES,
    "maskable_random": _SCORES,
    "score_init": _SCORES,
    "score_init_shuffled": _SCORES,
    "score_init_normal": _SCORES,
    "twn": _WEIGHTS,
    "ttq": {_WEIGHT: 0.1},  # its latent weights get p or n times the gradient, about a twentieth
    "binary_connect": _WEIGHTS,
    "multi_prize": {_SCORE: 10.0},
    "multi_prize_binary": {_SCORE: 10.0},
    "graft": {_SCORE: 50.0},
    "neural_wirings": _WEIGHTS,
    "movement": _BOTH,
    "soft_movement": _BOTH,
    "movement_distilled": _BOTH,
    "joint": {_SCORE: 50.0, _WEIGHT: 0.01},
    "block_movement": {_SCORE: 1.0, _WEIGHT: 0.01},
    "packnet": _CHAIN,
    "supsup": _SCORES,
    "lottery": _CHAIN,
    "evolution": _CHAIN,
    "wise_ft": _CHAIN,
    "rebasin": _CHAIN,
    "ensemble": {_SCORE: 100.0, _WEIGHT: 0.05},
    "nbd": {_SCORE: 0.003},
    "swav": _SCORES,
    "simclr": _SCORES,
    "moco_v2": _SCORES,
    "moco_v3": _SCORES,
    "dino": _SCORES,
    "clip": _SCORES,
    "slip": _SCORES,
}


def tries(row: str) -> dict[float, tuple[str, ...]]:
    """{factor: overrides} of a row; empty where nothing is trained."""
    start = STARTS.get(row, {})
    return {f: tuple(f"{key}={rate * f:.3g}" for key, rate in start.items()) for f in FACTORS if start}


def score(outcome: Mapping[str, Any]) -> float:
    """What a try is judged by: the mean of k-NN and the row's own head, of those that it has."""
    found = [outcome[key] for key in ("knn20", "head") if outcome.get(key) is not None]
    return sum(found) / len(found) if found else 0.0


def table() -> dict[str, dict[str, Any]]:
    """What `rates.json` holds: {setting: {row: its rates and the scores of its tries}}."""
    found: dict[str, dict[str, Any]] = json.loads(CHOSEN.read_text()) if CHOSEN.exists() else {}
    return found


def chosen(setting: str, row: str) -> tuple[str, ...]:
    """The overrides that tuning chose for a row; without it, where its line starts, carried over."""
    if found := table().get(setting, {}).get(row):
        return tuple(found["rates"])
    relative = {} if row in MEANS_THE_SAME else CARRIED.get(setting, {})
    # not what the digits chose: their small network bears rates that destroy a larger one
    return tuple(f"{key}={rate * relative.get(key, 1):.3g}" for key, rate in STARTS.get(row, {}).items())


def save(setting: str, row: str, scores: Mapping[float, float]) -> None:
    """Write the best try of a row into `rates.json`, with the scores of all; of equal ones the first."""
    known = table()
    best = max(scores, key=scores.__getitem__)
    known.setdefault(setting, {})[row] = {
        "rates": list(tries(row)[best]),
        "validation": {f"{factor:g}": round(value, 4) for factor, value in scores.items()},
    }
    CHOSEN.write_text(json.dumps(known, indent=1) + "\n")
