"""Rows of the mask families that train scores alone, or nothing, and of their variants."""

from benchmarks.methods.row import Row, config_row

_GROUP = "mask family"
_MASKS = ("mask.include=vit", "optim.head_lr=0.05")
_RANDOM = ("backbone.weights=null", "backbone.pretrained=false")
_PAPER = "Warmerdam et al. 2024"

ROWS: tuple[Row, ...] = (
    config_row("threshold", _GROUP, _PAPER, *_MASKS),
    config_row("piggyback", _GROUP, "Mallya et al. 2018", *_MASKS),
    config_row("edge_popup", _GROUP, "Ramanujan et al. 2020", *_MASKS),
    config_row("edge_popup_global", _GROUP, "Ramanujan et al. 2020", *_MASKS),
    config_row("edge_popup_random", _GROUP, "Ramanujan et al. 2020", *_MASKS, *_RANDOM),
    config_row(
        *("edge_popup_kaiming", _GROUP, "Ramanujan et al. 2020", *_MASKS, *_RANDOM),
        "backbone.random=kaiming_normal",
        config="edge_popup_random",
    ),
    config_row("topk", _GROUP, "-", *_MASKS),
    config_row("progressive", _GROUP, "Zhu and Gupta 2017", *_MASKS),
    config_row("random_mask", _GROUP, "-", *_MASKS),
    config_row("magnitude_mask", _GROUP, "Han et al. 2015", *_MASKS),
    config_row("first_layers", _GROUP, f"{_PAPER}, appendix", *_MASKS),
    config_row(
        *("layers_by_name", _GROUP, f"{_PAPER}, appendix", *_MASKS),
        "mask.include=['*mlp.fc[12].*']",
        config="threshold",
    ),
    config_row("maskable", _GROUP, f"{_PAPER}, appendix F", *_MASKS),
    config_row(
        *("maskable_random", _GROUP, f"{_PAPER}, appendix F", *_MASKS),
        "mask.maskable_by=random",
        config="maskable",
    ),
    config_row("score_init", _GROUP, _PAPER, *_MASKS),
    config_row(
        *("score_init_shuffled", _GROUP, _PAPER, *_MASKS),
        "mask.init=shuffled_magnitude",
        config="score_init",
    ),
    config_row("score_init_normal", _GROUP, _PAPER, *_MASKS, "mask.init=normal", config="score_init"),
)
