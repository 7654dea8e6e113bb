"""Rows of the mask families that train scores alone, or nothing; learning rates fit the small settings."""

from benchmarks.method_rows.row import Row, config_row

_GROUP = "mask family"
_MASKS = ("mask.include=vit", "optim.head_lr=0.05")
_THRESHOLD = (*_MASKS, "optim.score_lr=100")

ROWS: tuple[Row, ...] = (
    config_row("threshold", _GROUP, "Warmerdam et al. 2024", *_THRESHOLD),
    config_row("piggyback", _GROUP, "Mallya et al. 2018", *_MASKS, "optim.score_lr=0.5"),
    config_row("edge_popup", _GROUP, "Ramanujan et al. 2020", *_THRESHOLD),
    config_row("edge_popup_global", _GROUP, "Ramanujan et al. 2020", *_THRESHOLD),
    config_row(
        *("edge_popup_random", _GROUP, "Ramanujan et al. 2020", *_MASKS, "optim.score_lr=1"),
        *("backbone.weights=null", "backbone.pretrained=false"),
    ),
    config_row("topk", _GROUP, "-", *_THRESHOLD),
    config_row("progressive", _GROUP, "Zhu and Gupta 2017", *_THRESHOLD),
    config_row("random_mask", _GROUP, "-", *_MASKS),
    config_row("magnitude_mask", _GROUP, "Han et al. 2015", *_MASKS),
    config_row("first_layers", _GROUP, "Warmerdam et al. 2024, appendix", *_THRESHOLD),
    config_row("maskable", _GROUP, "Warmerdam et al. 2024, appendix F", *_THRESHOLD),
    config_row("score_init", _GROUP, "Warmerdam et al. 2024", *_THRESHOLD),
)
