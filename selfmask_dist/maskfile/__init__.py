"""The mask file: one or more masks of one backbone, written and read without executing anything.

`mask` says what is in it, `forms` what its kinds mean, `codec` turns bits into bytes, `container` lays bytes
out and guards them, `arrays` reads what lies in them, `file` brings them together, `fit` puts a mask on a
model, and `arithmetic` makes masks out of masks. Knows nothing of optimizers or process groups.
"""

from selfmask_dist.maskfile.file import (
    MAX_WEIGHTS,
    read_backbone_name,
    read_mask_file,
    read_parameter,
    verify_mask_file,
    write_mask_file,
)
from selfmask_dist.maskfile.fit import apply_mask, check_fits, describe_file, from_masks, weights_of
from selfmask_dist.maskfile.forms import materialize, take_apart
from selfmask_dist.maskfile.mask import Mask, MaskFile, MaskFileError

__all__ = [
    "MAX_WEIGHTS",
    "Mask",
    "MaskFile",
    "MaskFileError",
    "apply_mask",
    "check_fits",
    "describe_file",
    "from_masks",
    "materialize",
    "read_backbone_name",
    "read_mask_file",
    "read_parameter",
    "take_apart",
    "verify_mask_file",
    "weights_of",
    "write_mask_file",
]
