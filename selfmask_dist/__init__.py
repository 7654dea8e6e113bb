"""Self-Masking Networks at any scale: one frozen backbone, and one learned bit per weight for each new task.

>>> from selfmask_dist import attach, apply_masks

Reading order: `config.config` -> `masking.core` -> `masking.attach` -> `objectives.base` -> `parallel.engine`
-> `training.trainer` -> `training.run` -> `maskfile.file` -> `cascade.run`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from selfmask_dist.common import version

if TYPE_CHECKING:
    from selfmask_dist.cascade.model import load_cascade
    from selfmask_dist.maskfile.api import Masks, apply_masks, attach, detach
    from selfmask_dist.maskfile.bank import MaskBank
    from selfmask_dist.masking import Family, Segment
    from selfmask_dist.models.hub import push_to_hub
    from selfmask_dist.models.load import from_pretrained, load
    from selfmask_dist.models.peft_masks import SelfMaskConfig

__version__ = version.VERSION
__all__ = [
    "Family",
    "MaskBank",
    "Masks",
    "Segment",
    "SelfMaskConfig",
    "__version__",
    "apply_masks",
    "attach",
    "detach",
    "from_pretrained",
    "load",
    "load_cascade",
    "push_to_hub",
]

_HOMES = {
    "Family": "masking",
    "MaskBank": "maskfile.bank",
    "Masks": "maskfile.api",
    "Segment": "masking",
    "SelfMaskConfig": "models.peft_masks",
    "apply_masks": "maskfile.api",
    "attach": "maskfile.api",
    "detach": "maskfile.api",
    "from_pretrained": "models.load",
    "load": "models.load",
    "load_cascade": "cascade.model",
    "push_to_hub": "models.hub",
}


def __getattr__(name: str) -> Any:
    # imported when it is asked for: `selfmask --help` and the launcher read only the configuration and must
    # not wait seconds for torch
    if name in _HOMES:
        return getattr(importlib.import_module(f"selfmask_dist.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
