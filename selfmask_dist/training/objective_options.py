"""From an objective's section of the configuration to the keywords of its `build`.

Times in epochs become steps here. Knows neither backbones nor engines.
"""

from collections.abc import Callable
from typing import Any

from selfmask_dist import objectives
from selfmask_dist.config import Config


def objective_options(config: Config, *, steps_per_epoch: int) -> dict[str, Any]:
    """The keywords of `objectives.build_objective` that follow from the configuration."""
    return {"seed": config.seed} | _KINDS[config.objective.name](config, steps_per_epoch)


def _supervised(config: Config, steps_per_epoch: int) -> dict[str, Any]:
    section = config.objective
    return {
        "head": section.head,
        "head_norm": section.head_norm,
        "label_smoothing": section.label_smoothing,
        "prompts": section.prompts,
    }


def _swav(config: Config, steps_per_epoch: int) -> dict[str, Any]:
    section = config.swav
    return {
        "options": objectives.SwavOptions(
            num_prototypes=section.prototypes,
            dim=section.dim,
            temperature=section.temperature,
            epsilon=section.epsilon,
            iterations=section.sinkhorn_iterations,
            queue_length=section.queue_length,
            queue_start=round(section.queue_start_epoch * steps_per_epoch),
            freeze_steps=section.freeze_steps,
        )
    }


def _simclr(config: Config, steps_per_epoch: int) -> dict[str, Any]:
    return {"options": objectives.SimclrOptions(**config.simclr.model_dump())}


def _moco_v2(config: Config, steps_per_epoch: int) -> dict[str, Any]:
    return {"options": objectives.MocoV2Options(**config.moco_v2.model_dump())}


def _moco_v3(config: Config, steps_per_epoch: int) -> dict[str, Any]:
    num_steps = round(config.train.epochs * steps_per_epoch)
    return {"options": objectives.MocoV3Options(**config.moco_v3.model_dump(), num_steps=num_steps)}


def _dino(config: Config, steps_per_epoch: int) -> dict[str, Any]:
    section = config.dino
    return {
        "options": objectives.DinoOptions(
            outputs=section.outputs,
            hidden=section.hidden,
            bottleneck=section.bottleneck,
            student_temperature=section.student_temperature,
            teacher_temperatures=section.teacher_temperature,
            warmup_steps=round(section.temperature_epochs * steps_per_epoch),
            center_momentum=section.center_momentum,
            momentum=section.momentum,
            freeze_steps=round(section.freeze_epochs * steps_per_epoch),
            num_steps=round(config.train.epochs * steps_per_epoch),
        )
    }


def _clip(config: Config, steps_per_epoch: int) -> dict[str, Any]:
    return {"text": config.clip.text}


def _slip(config: Config, steps_per_epoch: int) -> dict[str, Any]:
    return {"text": config.clip.text, "options": objectives.SlipOptions(**config.slip.model_dump())}


_KINDS: dict[str, Callable[[Config, int], dict[str, Any]]] = {
    "supervised": _supervised,
    "swav": _swav,
    "simclr": _simclr,
    "moco_v2": _moco_v2,
    "moco_v3": _moco_v3,
    "dino": _dino,
    "clip": _clip,
    "slip": _slip,
}
