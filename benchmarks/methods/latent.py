"""Rows of families whose weights are trained or quantised."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.methods.row import Outcome, Row, Setting, config_path, config_row, outcome_of, train
from selfmask_dist.config import load_config
from selfmask_dist.maskfile import apply_mask, read_mask_file
from selfmask_dist.maskfile.tools.shrink import shrink
from selfmask_dist.training.build import build_backbone

GROUP = "weights trained or quantised"
_HEAD = "optim.head_lr=0.05"
_TEACHER = ("method=finetune", "optim.weight_lr=0.02", _HEAD, "eval.probe=false")


def _finetuned(setting: Setting, place: str) -> Path:
    """The folder of a fine-tuned model; its own numbers stand in its own row."""
    plain = replace(setting, folder=setting.folder / place, rates=())
    return train(plain, "finetuned", None, _TEACHER)[1]


def _graft(setting: Setting) -> Outcome:
    """Fine-tuned first, then grafted."""
    own = (f"mask.graft_from={_finetuned(setting, 'grafted_from')}", _HEAD)
    result, folder = train(setting, "graft", config_path("graft"), own)
    return outcome_of(result, folder, setting)


def _distilled(setting: Setting) -> Outcome:
    """Movement pruning taught by the fine-tuned, unpruned model."""
    teacher = _finetuned(setting, "taught_by")
    own = (f"objective.distill_from={teacher}", "objective.distill_weight=0.5", _HEAD)
    result, folder = train(setting, "movement_distilled", config_path("movement"), own)
    return outcome_of(result, folder, setting)


def _smaller(folder: Path) -> dict[str, Any]:
    """What is left when dead heads and hidden units are cut out."""
    encoder = build_backbone(load_config(folder / "config.yaml")).encoder
    before = sum(parameter.numel() for parameter in encoder.parameters())
    apply_mask(encoder, next(iter(read_mask_file(folder / "final.mask").masks.values())))
    shrink(encoder)
    return {"dense weights left": sum(parameter.numel() for parameter in encoder.parameters()) / before}


ROWS = [
    config_row("twn", GROUP, "Li et al. 2016", _HEAD),
    config_row("ttq", GROUP, "Zhu et al. 2017", _HEAD),
    config_row("binary_connect", GROUP, "Courbariaux et al. 2015", _HEAD),
    config_row("multi_prize", GROUP, "Diffenderfer and Kailkhura 2021", _HEAD),
    config_row(
        *("multi_prize_binary", GROUP, "Diffenderfer and Kailkhura 2021", _HEAD),
        "backbone.activations=sign",
        config="multi_prize",
    ),
    Row("graft", GROUP, "after Panigrahi et al. 2023", _graft, ("graft",)),
    config_row("neural_wirings", GROUP, "Wortsman et al. 2019", _HEAD),
    config_row("movement", GROUP, "Sanh et al. 2020", _HEAD),
    config_row("soft_movement", GROUP, "Sanh et al. 2020", _HEAD, "mask.penalty=400"),
    Row("movement_distilled", GROUP, "Sanh et al. 2020, Hinton et al. 2015", _distilled, ("movement",)),
    config_row("joint", GROUP, "Srinivas et al. 2017", _HEAD),
    config_row(
        *("block_movement", GROUP, "Lagunas et al. 2021", _HEAD),
        *("mask.block_rows=1", "mask.block_columns=0"),
        measures=_smaller,
    ),
]
