"""Baselines: weights trained in whole or in part, and frozen features. See `docs/methods.md`."""

from benchmarks.method_rows.row import Row, config_row

_GROUP = "baseline"

ROWS: tuple[Row, ...] = (
    config_row("finetune_sgd", _GROUP, "-", "optim.weight_lr=0.01", "optim.head_lr=0.05"),
    config_row("finetune_adamw", _GROUP, "arXiv 1711.05101", "optim.weight_lr=1e-3", "optim.head_lr=1e-2"),
    config_row(
        *("finetune_frozen_embedding", _GROUP, "arXiv 2211.09359"),
        *("optim.weight_lr=0.01", "optim.head_lr=0.05"),
    ),
    config_row("finetune_bias", _GROUP, "arXiv 2106.10199", "optim.weight_lr=5e-3", "optim.head_lr=1e-2"),
    config_row("finetune_norm", _GROUP, "arXiv 2003.00152", "optim.weight_lr=5e-3", "optim.head_lr=1e-2"),
    config_row("lora", _GROUP, "arXiv 2106.09685", "optim.weight_lr=5e-3", "optim.head_lr=1e-2"),
    config_row("probe", _GROUP, "arXiv 1610.01644"),
    config_row("frozen_knn", _GROUP, "arXiv 1805.01978"),
)
