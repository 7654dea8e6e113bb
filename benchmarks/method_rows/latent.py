"""Rows of families whose weights are trained or quantised; learning rates fit the small settings."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.method_rows.row import CONFIGS, Outcome, Row, Setting, config_row, outcome_of, train
from selfmask_dist.artifact import apply_mask, read_mask_file
from selfmask_dist.assembly import build_backbone
from selfmask_dist.config import load_config
from selfmask_dist.shrink import shrink

GROUP = "weights trained or quantised"
_TEACHER = ("method=finetune", "optim.weight_lr=0.02", "optim.head_lr=0.05", "eval.probe=false")


def _graft(setting: Setting) -> Outcome:
    """Fine-tuned first, then grafted; the fine-tuned model's own numbers stand in its own row."""
    tuned = replace(setting, folder=setting.folder / "grafted_from")
    _, teacher = train(tuned, "finetuned", None, _TEACHER)
    own = (f"mask.graft_from={teacher}", "optim.score_lr=50")
    result, folder = train(setting, "graft", CONFIGS / "graft.yaml", own)
    return outcome_of(result, folder, setting)


def _distilled(setting: Setting) -> Outcome:
    """Movement pruning taught by the fine-tuned, unpruned model."""
    tuned = replace(setting, folder=setting.folder / "taught_by")
    _, teacher = train(tuned, "finetuned", None, _TEACHER)
    own = (f"objective.distill_from={teacher}", "objective.distill_weight=0.5")
    result, folder = train(setting, "movement_distilled", CONFIGS / "movement.yaml", own)
    return outcome_of(result, folder, setting)


def _smaller(folder: Path) -> dict[str, Any]:
    """What is left when dead heads and hidden units are cut out."""
    encoder = build_backbone(load_config(folder / "config.yaml")).encoder
    before = sum(parameter.numel() for parameter in encoder.parameters())
    apply_mask(encoder, next(iter(read_mask_file(folder / "final.mask").masks.values())))
    shrink(encoder)
    return {"dense weights left": sum(parameter.numel() for parameter in encoder.parameters()) / before}


ROWS = [
    config_row("twn", GROUP, "Li et al. 2016"),
    config_row("ttq", GROUP, "Zhu et al. 2017"),
    config_row("binary_connect", GROUP, "Courbariaux et al. 2015"),
    config_row("multi_prize", GROUP, "Diffenderfer and Kailkhura 2021"),
    Row("graft", GROUP, "after Panigrahi et al. 2023", _graft),
    config_row("neural_wirings", GROUP, "Wortsman et al. 2019"),
    config_row("movement", GROUP, "Sanh et al. 2020"),
    config_row("soft_movement", GROUP, "Sanh et al. 2020", "mask.penalty=400"),
    Row("movement_distilled", GROUP, "Sanh et al. 2020, Hinton et al. 2015", _distilled),
    config_row("joint", GROUP, "Srinivas et al. 2017"),
    config_row(
        "block_movement",
        GROUP,
        "Lagunas et al. 2021",
        "mask.block_rows=1",
        "mask.block_columns=0",
        measures=_smaller,
    ),
]
