"""Masks as a reparametrisation: `core` holds the equations, `selection` the names, `attach` puts both on a
model.
"""

from selfmask_dist.masking.attach import Masks, attach
from selfmask_dist.masking.core import binarize, materialize, pullback, scale_factor
from selfmask_dist.masking.families import Family, Options
from selfmask_dist.masking.families import build as build_family
from selfmask_dist.masking.parameter import MaskedParameter
from selfmask_dist.masking.selection import PRESETS, select
from selfmask_dist.masking.shards import Shards
from selfmask_dist.masking.statistics import MaskStatistics, measure

__all__ = [
    "PRESETS",
    "Family",
    "MaskStatistics",
    "MaskedParameter",
    "Masks",
    "Options",
    "Shards",
    "attach",
    "binarize",
    "build_family",
    "materialize",
    "measure",
    "pullback",
    "scale_factor",
    "select",
]
