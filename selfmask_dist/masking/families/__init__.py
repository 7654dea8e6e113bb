"""Mask families by name: `mask.family` in a config.

A family that ships is a class in a file here and a line in `FAMILIES`. One that does not ship needs no line:
`module:Class` finds it in any module that can be imported.
"""

import difflib
import importlib
from typing import Any

from selfmask_dist.masking.families.base import Family, FamilyOptions
from selfmask_dist.masking.families.binary_connect import BinaryConnect
from selfmask_dist.masking.families.block_movement import BlockMovement
from selfmask_dist.masking.families.fixed import MagnitudeMask, RandomMask
from selfmask_dist.masking.families.graft import Graft
from selfmask_dist.masking.families.joint import Joint
from selfmask_dist.masking.families.movement import Movement, SoftMovement
from selfmask_dist.masking.families.multi_prize import MultiPrize
from selfmask_dist.masking.families.neural_wirings import NeuralWirings
from selfmask_dist.masking.families.ternary import TernaryWeights, TrainedTernary
from selfmask_dist.masking.families.threshold import Piggyback, Threshold
from selfmask_dist.masking.families.topk import EdgePopup, TopK

# config.masks.MASK_FAMILIES has the same names
FAMILIES: dict[str, type[Family]] = {
    family.name: family
    for family in (
        # masks on frozen weights
        Threshold,
        Piggyback,
        EdgePopup,
        TopK,
        RandomMask,
        MagnitudeMask,
        # weights trained or quantised
        TernaryWeights,
        TrainedTernary,
        BinaryConnect,
        MultiPrize,
        Graft,
        NeuralWirings,
        Movement,
        SoftMovement,
        Joint,
        BlockMovement,
    )
}


def build(name: str, **options: Any) -> Family:
    """Return a family by its name, or by `module:Class`; `options` are the fields of `FamilyOptions`.

    Raises:
        ValueError: there is no such family, or it does not take these options.
    """
    return find(name)(FamilyOptions(**options))


def find(name: str) -> type[Family]:
    """Return the class of a family.

    Raises:
        ValueError: there is none of that name.
    """
    if name in FAMILIES:
        return FAMILIES[name]
    module, _, attribute = name.partition(":")
    if not attribute:
        near = difflib.get_close_matches(name, FAMILIES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(
            f"mask.family {name!r} is neither one of {', '.join(FAMILIES)} nor module:Class{hint}"
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"mask.family {name!r} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Family)):
        raise ValueError(f"mask.family {name!r} is no subclass of selfmask_dist.masking.families.Family")
    return found


__all__ = ["FAMILIES", "Family", "FamilyOptions", "build", "find"]
