"""Which parameters of a model get a mask, and how much of it they are.

`layers` reads the module tree, `choosing` selects by its parts, by the paper's rules or by patterns, and
`coverage` says what was left out.
"""

from selfmask_dist.masking.selection.choosing import (
    PRESET_NAMES,
    PRESETS,
    Selection,
    adapter_parameters,
    as_tuple,
    is_fused_qkv,
    norm_parameters,
    rule_of,
    select,
)
from selfmask_dist.masking.selection.coverage import Coverage, measure_coverage, uncovered
from selfmask_dist.masking.selection.layers import LayerParts, find_parts, is_norm

__all__ = [
    "PRESETS",
    "PRESET_NAMES",
    "Coverage",
    "LayerParts",
    "Selection",
    "adapter_parameters",
    "as_tuple",
    "find_parts",
    "is_fused_qkv",
    "is_norm",
    "measure_coverage",
    "norm_parameters",
    "rule_of",
    "select",
    "uncovered",
]
