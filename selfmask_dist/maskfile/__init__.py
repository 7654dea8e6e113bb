"""The mask file: one or more masks of one backbone, written and read without executing anything.

`mask` says what is in it, `forms` what its kinds mean, `codec` turns bits into bytes, `container` lays bytes
out and guards them, `file` brings them together with `reading`, and `fit` puts a mask on a model. `api` is
what users import. `bank` holds many masks of one model in memory; `layers`, `rewrite` and `kernel` put them
on fast. `model` is what makes a mask answer with a class. `tools` compares, draws, merges, imports and
exports masks. Knows nothing of optimizers or process groups.
"""

from selfmask_dist.maskfile.file import (
    MAX_WEIGHTS,
    add_numbers,
    read_backbone_name,
    read_mask_file,
    verify_mask_file,
    write_mask_file,
)
from selfmask_dist.maskfile.fit import (
    apply_mask,
    check_fits,
    describe_file,
    from_masks,
    warn_of_verdict,
    weights_of,
)
from selfmask_dist.maskfile.forms import materialize, take_apart
from selfmask_dist.maskfile.mask import MarkedMaskWarning, Mask, MaskFile, MaskFileError
from selfmask_dist.maskfile.model.coding import add_models, drop_models
from selfmask_dist.maskfile.model.part import Head, Model

__all__ = [
    "MAX_WEIGHTS",
    "Head",
    "MarkedMaskWarning",
    "Mask",
    "MaskFile",
    "MaskFileError",
    "Model",
    "add_models",
    "add_numbers",
    "apply_mask",
    "check_fits",
    "describe_file",
    "drop_models",
    "from_masks",
    "materialize",
    "read_backbone_name",
    "read_mask_file",
    "take_apart",
    "verify_mask_file",
    "warn_of_verdict",
    "weights_of",
    "write_mask_file",
]
