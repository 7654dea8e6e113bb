"""Baselines: weights trained in whole or in part, and frozen features. See `docs/methods.md`."""

from benchmarks.methods.row import Row, config_row

_GROUP = "baseline"
_SGD = "optim.head_lr=0.05"
_ADAMW = "optim.head_lr=1e-2"

ROWS: tuple[Row, ...] = (
    config_row("finetune_sgd", _GROUP, "-", _SGD),
    config_row("finetune_adamw", _GROUP, "arXiv 1711.05101", _ADAMW),
    config_row("finetune_frozen_embedding", _GROUP, "arXiv 2211.09359", _SGD),
    config_row("finetune_bias", _GROUP, "arXiv 2106.10199", _ADAMW),
    config_row("finetune_norm", _GROUP, "arXiv 2003.00152", _ADAMW),
    config_row("lora", _GROUP, "arXiv 2106.09685", _ADAMW),
    config_row("probe", _GROUP, "arXiv 1610.01644"),
    config_row("frozen_knn", _GROUP, "arXiv 1805.01978"),
)
