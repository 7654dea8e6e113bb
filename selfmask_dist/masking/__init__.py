"""Masks as a reparametrisation of a model's weights: theta from scores, and the gradient back to the scores.

`core` holds the equations of the default mask, `families` every way to mask, `selection` says which
parameters get one, and `attach` puts all of it on a model. `pieces` is what a process holds of a parameter,
where an engine shards.
"""

from selfmask_dist.masking.attach import AttachedMasks, attach
from selfmask_dist.masking.checks import (
    ForgottenBindWarning,
    MaskWarning,
    PartlyMaskedWarning,
    UnusedGradientWarning,
)
from selfmask_dist.masking.core import binarize, materialize, pullback, scale_factor
from selfmask_dist.masking.families import Family, FamilyOptions
from selfmask_dist.masking.families import build as build_family
from selfmask_dist.masking.marks import detach
from selfmask_dist.masking.parameter import MaskedParameter
from selfmask_dist.masking.pieces import Segment, SegmentedParameter, Shards
from selfmask_dist.masking.reading import MaskStatistics, measure
from selfmask_dist.masking.selection import PRESETS, select

__all__ = [
    "PRESETS",
    "AttachedMasks",
    "Family",
    "FamilyOptions",
    "ForgottenBindWarning",
    "MaskStatistics",
    "MaskWarning",
    "MaskedParameter",
    "PartlyMaskedWarning",
    "Segment",
    "SegmentedParameter",
    "Shards",
    "UnusedGradientWarning",
    "attach",
    "binarize",
    "build_family",
    "detach",
    "materialize",
    "measure",
    "pullback",
    "scale_factor",
    "select",
]
