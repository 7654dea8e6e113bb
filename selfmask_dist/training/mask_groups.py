"""What an optimizer gets of masks: a group for scores, one for weights, one for small numbers; and the second
weights of families that have them. Wiring, for `assembly`.
"""

from pathlib import Path
from typing import Any

from torch import nn

from selfmask_dist.backbones.weights import read_state_dict
from selfmask_dist.config import Config
from selfmask_dist.maskfile.api import Masks
from selfmask_dist.masking import Family


def mask_groups(config: Config, masks: Masks) -> list[dict[str, Any]]:
    """Scores, weights and small numbers under masks: latent weights are trained as weights are."""
    groups = []
    numbers = [entry.numbers for entry in masks.entries if entry.numbers is not None]
    of_numbers = {id(number) for number in numbers}
    scores = [parameter for parameter in masks.parameters() if id(parameter) not in of_numbers]
    if scores and masks.family.starts_from_weight:
        groups.append(weight_group(config, scores))
    elif scores:
        groups.append({"name": "scores", "params": scores, "base_lr": config.optim.score_lr})
    if weights := list(masks.weight_parameters()):
        groups.append(weight_group(config, weights))
    if numbers:  # scales of weights, or scores of blocks; without weight decay
        rate = config.optim.weight_lr if masks.family.starts_from_weight else config.optim.score_lr
        groups.append({"name": "numbers", "params": numbers, "base_lr": rate})
    return groups


def second_weights(config: Config, family: Family) -> dict[str, Any]:
    """The argument `other` of attach, for families that have second frozen weights.

    Raises:
        ValueError: they are not named, or cannot be read.
    """
    if not family.needs_other:
        return {}
    if config.mask.graft_from is None:
        raise ValueError(
            "mask.graft_from is not set: give the fine-tuned weights that mask.family=graft chooses from, "
            "the folder of a finished run of method=finetune or a file"
        )
    path = Path(config.mask.graft_from)
    if path.is_dir():
        path /= "encoder.safetensors"
        if not path.exists():
            raise ValueError(
                f"mask.graft_from: {path.parent} has no {path.name}; name the folder of a finished run of "
                "method=finetune, or a file of weights"
            )
    return {"other": read_state_dict(path, setting="mask.graft_from")}


def weight_group(config: Config, weights: list[nn.Parameter]) -> dict[str, Any]:
    """The optimizer's group of the backbone's weights."""
    return {
        "name": "weights",
        "params": weights,
        "base_lr": config.optim.weight_lr,
        "weight_decay": config.optim.weight_decay,
    }
