"""Self-Masking Networks at any scale: one frozen backbone, and one learned bit per weight for each new task.

>>> from selfmask_dist import attach, apply_masks

Reading order: `config` -> `masking` -> `objectives.base` -> `trainer` -> `artifact`.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Masks", "__version__", "apply_masks", "attach"]

if TYPE_CHECKING:
    from selfmask_dist.maskfile.api import Masks, apply_masks, attach


def __getattr__(name: str) -> Any:
    # lazy: `selfmask --help` and the launcher read only the configuration and must not wait for torch
    if name in ("Masks", "apply_masks", "attach"):
        from selfmask_dist.maskfile import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
