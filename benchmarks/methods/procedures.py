"""Procedures over masks and weights. A chain of trainings shares the setting's epochs out among them, so
that a row makes about as many steps as the others.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from benchmarks.methods.row import Outcome, Row, Setting, config_path, outcome_of, train
from selfmask_dist.config import load_config

_GROUP = "procedures"
_WEIGHTS = ("optim.weight_lr=0.05", "optim.head_lr=0.05", "optim.warmup_epochs=0", "objective.head_norm=l2")
_MASK = ("mask.include=auto", "optim.score_lr=100", "optim.head_lr=0.05", "optim.warmup_epochs=0")
_SCRATCH = ("backbone.weights=null", "backbone.pretrained=false")
_QUIET = ("eval.knn_every=0", "eval.frozen_baseline=false")

OwnFn = Callable[[Setting], tuple[str, ...]]
MoreFn = Callable[[dict[str, Any]], dict[str, Any]]


def _row(
    name: str,
    source: str,
    *own: str,
    share: float,
    more: MoreFn,
    own_fn: OwnFn = lambda setting: (),
) -> Row:
    """A row that is `configs/methods/{name}.yaml`, run in the setting.

    Args:
        own, own_fn: overrides of this row.
        share: of the setting's epochs, for each training.
        more: further numbers, from the run's result.
    """

    def measure(setting: Setting) -> Outcome:
        epochs = load_config(None, setting.overrides).train.epochs * share
        overrides = (*_QUIET, *own, *own_fn(setting), f"train.epochs={epochs}")
        result, folder = train(setting, name, config_path(name), overrides)
        active = result.get("active", 1.0)
        outcome = outcome_of(result, folder, setting)
        return replace(outcome, active=active, more=more(result))

    return Row(name, _GROUP, source, measure)


def _parts(*names: str) -> MoreFn:
    return lambda result: {name.replace("_", " "): result[name] for name in names}


def _small_vit(setting: Setting) -> tuple[str, ...]:
    """A ViT whose weights are about as large as a mask of the setting's: a quarter as wide, half as deep."""
    kwargs = load_config(None, setting.overrides).backbone.kwargs
    width, depth = int(str(kwargs.get("embed_dim", 192))), int(str(kwargs.get("depth", 12)))
    small = {**kwargs, "embed_dim": width // 4, "depth": depth // 2, "num_heads": 2}
    return (f"procedure.small_backbone={json.dumps({'kwargs': small})}",)


ROWS = [
    _row(
        *("packnet", "Mallya and Lazebnik 2018", *_WEIGHTS, "procedure.include=auto", "procedure.tasks=2"),
        share=2 / 3,  # tasks have a part of the images, and train one and a half times
        more=lambda result: {
            "tasks": result["tasks"],
            "accuracies are": "means over two tasks, of half the classes each",
        },
    ),
    _row(
        *("supsup", "Wortsman et al. 2020", *_MASK, "procedure.tasks=2", "optim.score_lr=1"),
        "procedure.infer_images=[16, 4, 1]",
        share=1.0,  # tasks have a part of the images
        more=lambda result: {
            "accuracies are": "means over two tasks, each image's task known",
            **_parts("inferred")(result),
        },
    ),
    _row(
        *("lottery", "Frankle and Carbin 2019, Frankle et al. 2020", *_WEIGHTS, "procedure.include=auto"),
        *("procedure.rounds=3", "procedure.prune=0.5", "procedure.rewind_steps=10"),
        share=1 / 4,
        more=_parts("rounds"),
    ),
    _row(
        *("evolution", "Taha et al. 2021", *_WEIGHTS, "procedure.include=auto", "procedure.split=wels"),
        *("procedure.split_rate=0.8", "procedure.generations=3"),
        share=1 / 3,
        more=_parts("generations", "fit"),
    ),
    _row(
        *("wise_ft", "Wortsman et al. 2022", *_WEIGHTS, "optim.warmup_epochs=1"),  # one whole training
        "procedure.alphas=[0.0, 0.25, 0.5, 0.75, 1.0]",
        share=1.0,
        more=_parts("alpha", "curve"),
    ),
    _row(
        *("rebasin", "Ainsworth et al. 2023", *_WEIGHTS, *_SCRATCH),
        share=1 / 2,
        more=_parts("barriers", "matched_by", "networks", "averaged_as_they_are"),
    ),
    _row(
        *("ensemble", "Lakshminarayanan et al. 2017", *_WEIGHTS, *_MASK),
        share=1 / 3,
        more=_parts("masks", "small_models"),
        own_fn=_small_vit,
    ),
]
