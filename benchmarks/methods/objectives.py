"""Masks trained by each objective on views of images, without labels; CLIP's and SLIP's also read captions.
See `docs/methods.md`.
"""

from benchmarks.methods.row import Outcome, Row, Setting, config_path, config_row, outcome_of, train

_GROUP = "objective"
_MASKS = ("mask.include=vit", "backbone.batchnorm=frozen", "optim.head_lr=0.05")
_OF_CAPTIONS = "captions are templates over class names, so this row sees labels; its backbone frozen"
_TWO_VIEWS = ("crops.global_count=2", "crops.local_count=0")


def _captioned(name: str, source: str, *own: str) -> Row:
    """A row on captions; its backbone is another one, so that one's frozen features stand beside it."""

    def measure(setting: Setting) -> Outcome:
        overrides = (*setting.captioned, *_MASKS, *own, "eval.final=true", "eval.frozen_baseline=true")
        result, folder = train(setting, name, config_path(name), overrides)
        outcome = outcome_of(result, folder, setting)
        outcome.more[_OF_CAPTIONS] = {
            key: value for key, value in result.get("frozen", {}).items() if key in ("knn20", "probe")
        }
        return outcome

    return Row(name, _GROUP, source, measure, (name,))


ROWS: tuple[Row, ...] = (
    config_row(
        *("nbd", _GROUP, "docs/unlabelled.md", "mask.include=vit", "backbone.batchnorm=frozen"),
        *("optim.score_step=rms", "nbd.crop_scale=[0.6, 1.0]"),
    ),
    config_row(
        *("swav", _GROUP, "arXiv 2006.09882", *_MASKS),
        # the paper's epsilon of 0.05 is for 500 prototypes and more: with it, nothing is learned here
        *("swav.prototypes=30", "swav.dim=32", "swav.epsilon=0.01", "swav.freeze_steps=30"),
        *("swav.queue_length=0", "optim.head_weight_decay=1e-6"),
    ),
    config_row("simclr", _GROUP, "arXiv 2002.05709", *_MASKS, *_TWO_VIEWS, "simclr.hidden=256"),
    config_row(
        *("moco_v2", _GROUP, "arXiv 2003.04297", *_MASKS, *_TWO_VIEWS),
        *("moco_v2.hidden=256", "moco_v2.queue_length=512", "moco_v2.momentum=0.99"),
    ),
    config_row("moco_v3", _GROUP, "arXiv 2104.02057", *_MASKS, *_TWO_VIEWS, "moco_v3.hidden=256"),
    config_row(
        *("dino", _GROUP, "arXiv 2104.14294", *_MASKS),
        *("dino.hidden=256", "dino.outputs=512", "dino.temperature_epochs=1"),
    ),
    _captioned("clip", "arXiv 2103.00020"),
    _captioned("slip", "arXiv 2112.12750", *_TWO_VIEWS, "slip.hidden=256"),
)
