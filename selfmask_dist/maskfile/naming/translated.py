"""A mask of one library's model on another library's model of the same weights.

The model's tensors are read under the mask's names, q, k and v joined or taken apart; so the fingerprint of
the weights is that of the mask, and theta is computed as where the mask was trained: one scale for a fused
q, k and v stays one. What follows is written back into the model's own tensors. Knows no file.
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from selfmask_dist.backbones import fingerprint
from selfmask_dist.backbones.libraries.views import Translation, translations
from selfmask_dist.common.tensor_names import placements
from selfmask_dist.maskfile.forms import materialize
from selfmask_dist.maskfile.mask import Mask, MaskFileError
from selfmask_dist.maskfile.reading import other_precision, wrong_backbone
from selfmask_dist.masking import marks


def is_of_another_library(names: Collection[str], model: nn.Module) -> bool:
    """Return whether a mask's names are not the model's, and are known as those of another library."""
    held = dict(model.named_parameters())
    return not placements(list(names), held) and any(True for _ in translations(names, held))


def find(mask: Mask, held: Mapping[str, Tensor]) -> Translation | None:
    """Return where a mask of another library lies among a model's tensors; None where no mapping is known.

    Raises:
        MaskFileError: the names fit, and the weights are not those of the mask.
    """
    refusal: MaskFileError | None = None
    for found in translations([*mask.bits, *mask.statistics], held):
        weights = {name: tensor for name, tensor in found.read(held).items() if name in mask.bits}
        if any(weights[name].shape != bits.shape for name, bits in mask.bits.items()):
            continue
        own = fingerprint(weights.items())
        expected = mask.weights_fingerprint
        if own == expected or other_precision(weights, expected, own, mask.rounded):
            return found
        refusal = MaskFileError(
            f"the mask's names are {found.source}'s, and were looked up in a model of {found.target}: "
            f"{wrong_backbone(weights, own, expected)}"
        )
    if refusal is not None:
        raise refusal
    return None


@torch.no_grad()
def put(model: nn.Module, held: Mapping[str, Tensor], mask: Mask, found: Translation, *, what: str) -> None:
    """Write theta and statistics of a mask into a model of another library, and mark its parameters.

    Args:
        held: the model's tensors.
        found: of `find`.
        what: for the marks.
    """
    weights = found.read(held)
    touched = {piece.name for name in mask.bits for piece in found.pieces[name]}
    before = {name: held[name].clone() for name in touched}
    for name in mask.bits:
        found.write(held, name, materialize(mask, name, weights[name]))
    for name, statistic in mask.statistics.items():
        found.write(held, name, statistic)
    for name in sorted(touched):
        marks.put(model, name, marks.record(f"theta of {what}", held[name], before[name]))
