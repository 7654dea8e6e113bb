"""Piggyback (Mallya, Davis, Lazebnik 2018, arXiv 1801.06519): M = 1[S > mu], theta = W * M.

    dL/dS = G * W

as published: S starts at 0.01 and mu is 0.005.
"""

from typing import ClassVar

from selfmask_dist.masking.families.base import Options
from selfmask_dist.masking.families.threshold import Threshold


class Piggyback(Threshold):
    """A threshold mask without a scale."""

    name: ClassVar[str] = "piggyback"

    def __init__(self, options: Options | None = None) -> None:
        options = options or Options(threshold=5e-3, scale="none")
        if options.scale != "none":
            raise ValueError(f"piggyback has no scale; set scale=none in place of {options.scale}")
        super().__init__(options)
