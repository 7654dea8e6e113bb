"""Masks trained without labels, by each objective on views of images. CLIP and SLIP need captions, which
neither data set of the comparison has. See `docs/methods.md`.
"""

from benchmarks.method_rows.row import Row, config_row

_GROUP = "objective"
_MASKS = ("mask.include=vit", "backbone.batchnorm=frozen", "optim.score_lr=100", "optim.head_lr=0.05")
_NO_LOCAL = ("crops.local_count=0",)  # no size of small crops suits both backbones

ROWS: tuple[Row, ...] = (
    config_row("simclr", _GROUP, "arXiv 2002.05709", *_MASKS, "simclr.hidden=256"),
    config_row(
        *("moco_v2", _GROUP, "arXiv 2003.04297"),
        *(*_MASKS, "moco_v2.hidden=256", "moco_v2.queue_length=512", "moco_v2.momentum=0.99"),
    ),
    config_row("moco_v3", _GROUP, "arXiv 2104.02057", *_MASKS, "moco_v3.hidden=256"),
    config_row(
        *("dino", _GROUP, "arXiv 2104.14294"),
        *(
            *_MASKS,
            *_NO_LOCAL,
            "optim.score_lr=300",
            "dino.hidden=256",
            "dino.outputs=512",
            "dino.temperature_epochs=5",
        ),
    ),
)
