"""A mask on a model: taken from masks in training, checked against a backbone, and put on it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from selfmask_dist.backbones import fingerprint
from selfmask_dist.maskfile.file import Weights, read_mask_file
from selfmask_dist.maskfile.forms import as_kind, materialize, take_apart
from selfmask_dist.maskfile.mask import Mask, MaskFileError
from selfmask_dist.masking import AttachedMasks


def from_masks(masks: AttachedMasks) -> Mask:
    """Return masks in training as a file holds them. Collective where they are sharded: every rank must call.

    Raises:
        MaskFileError: a family's form does not hold its theta.
    """
    bits = {name: kept.cpu() for name, kept in masks.masks().items()}
    segments = {entry.name: entry.num_segments for entry in masks.entries}
    weights, kind = masks.first_weights(), as_kind(masks.family.form)
    parts: dict[str, Any] = {}
    if kind != "threshold":
        for name, theta in masks.thetas().items():
            given = (theta.cpu(), bits[name], weights[name].cpu())
            for part, tensor in take_apart(kind, *given, num_parts=segments[name]).items():
                parts.setdefault(part, {})[name] = tensor
    return Mask(
        bits=bits,
        weights_fingerprint=fingerprint(weights.items()),
        scaled=masks.family.is_scaled,
        num_segments={name: number for name, number in segments.items() if number > 1},
        kind=kind,
        **parts,
        blocks=_blocks(masks),
        statistics={name: statistic.cpu() for name, statistic in masks.moved_statistics().items()},
        threshold=masks.threshold,
    )


def _blocks(masks: AttachedMasks) -> dict[str, tuple[int, int]]:
    """Return the blocks that share a bit, where those of a parameter's segments line up with its own."""
    found = {}
    for entry in masks.entries:
        rows = len(entry.theta) // entry.num_segments
        block = masks.family.block(torch.Size((rows, *entry.theta.shape[1:])))
        if block is not None and (entry.num_segments == 1 or rows % block[0] == 0):
            found[entry.name] = block
    return found


@torch.no_grad()
def apply_mask(model: nn.Module, mask: Mask) -> None:
    """Write theta (a * W * M, or what the mask's kind says) and the moved statistics into `model`.

    The model holds the frozen weights W. It may be the encoder itself or hold it under a prefix (`visual.` of
    a whole open_clip model, `module.`); other parameters, such as a head, are left alone.

    Raises:
        MaskFileError: a masked parameter is missing or has another shape, or the weights are not those of the
            mask.
    """
    tensors = check_fits(model, mask)
    for name in mask.bits:
        weight = tensors[name]
        weight.copy_(materialize(mask, name, weight))
    for name, statistic in mask.statistics.items():
        tensors[name].copy_(statistic)


def weights_of(model: nn.Module) -> Weights:
    """Return a function from the names that a mask has for a backbone's weights to those weights.

    Args:
        model: the backbone itself, or a model that holds it under a prefix.

    Raises:
        MaskFileError: when asked for a name that is not there, or there more than once.
    """
    tensors = dict(model.named_parameters())

    def find(name: str) -> Tensor:
        found = [key for key in tensors if key == name or key.endswith(f".{name}")]
        if name in found or len(found) == 1:
            return tensors[name if name in found else found[0]]
        raise MaskFileError(
            f"the model holds {len(found)} parameters called {name}; it is another architecture"
        )

    return find


def check_fits(model: nn.Module, mask: Mask, *, known: str | None = None) -> dict[str, Tensor]:
    """Return the tensors of `model` that a mask writes, by the mask's names; errors as in `apply_mask`.

    Args:
        known: the fingerprint of the weights under the mask, where it was taken before.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    prefix = _find_prefix(mask.bits, tensors)
    for name, bits in mask.bits.items():
        if tensors[prefix + name].shape != bits.shape:
            raise MaskFileError(
                f"{name} has shape {tuple(tensors[prefix + name].shape)} in the model and "
                f"{tuple(bits.shape)} in the mask; "
                f"build the backbone as it was when the mask was trained"
            )
    found = known or fingerprint((name, tensors[prefix + name]) for name in mask.bits)
    if found != mask.weights_fingerprint:
        raise MaskFileError(
            f"wrong backbone: the model's weights under the mask have fingerprint {found[:12]}, the mask was "
            f"trained on "
            f"{mask.weights_fingerprint[:12]}; load the same pretrained weights, with no mask applied yet"
        )
    missing = [name for name in mask.statistics if prefix + name not in tensors]
    if missing:
        raise MaskFileError(f"the mask brings running statistics the model does not have: {missing[:5]}")
    return {name: tensors[prefix + name] for name in (*mask.bits, *mask.statistics)}


def describe_file(path: str | Path) -> str:
    """Return what a mask file holds, as text for a person; verifies it on the way."""
    file = read_mask_file(path)
    lines = [
        f"{path}: {Path(path).stat().st_size:,} bytes",
        f"backbone {file.backbone or 'not stated'}, fingerprint "
        f"{file.backbone_fingerprint[:12] or 'not stated'}",
        *(f"{name} {value:.4f}" for name, value in file.metrics.items()),
    ]
    for name, mask in file.masks.items():
        kept = sum(int(bits.sum()) for bits in mask.bits.values())
        kind = "" if mask.kind == "threshold" else f" of kind {mask.kind}"
        lines.append(
            f"\nmask {name!r}{kind}: {mask.num_weights():,} weights, {kept / mask.num_weights():.2%} kept"
        )
        for parameter, bits in mask.bits.items():
            shape = "x".join(map(str, bits.shape))
            lines.append(
                f"  {parameter:40s} {shape:>14s}  {float(bits.double().mean()):7.2%} kept"
                f"{_describe_parts(mask, parameter)}"
            )
        if mask.statistics:
            lines.append(f"  and {len(mask.statistics)} moved statistics")
    return "\n".join(lines)


def _describe_parts(mask: Mask, parameter: str) -> str:
    """Return what a parameter has beside its bits, as the end of a line."""
    parts = []
    if parameter in mask.blocks:
        parts.append("blocks of {} x {}".format(*mask.blocks[parameter]))
    if parameter in mask.signs:
        share = float(mask.signs[parameter].double().mean())
        parts.append(f"{share:.2%} negative")
    if parameter in mask.scales:
        parts.append(
            "scales " + " ".join(f"{scale:.4g}" for scale in mask.scales[parameter].flatten().tolist())
        )
    if parameter in mask.values:
        parts.append(f"{mask.values[parameter].numel():,} trained values")
    return "".join(f", {part}" for part in parts)


def _find_prefix(names: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> str:
    """Return the one prefix under which the model holds every masked parameter."""
    first = next(iter(names))
    candidates = [name.removesuffix(first) for name in tensors if name == first or name.endswith(f".{first}")]
    fits = [prefix for prefix in candidates if all(prefix + name in tensors for name in names)]
    if "" in fits:
        return ""
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise MaskFileError(
            f"the model holds the masked parameters more than once, under {fits}; apply to the one submodule"
        )
    known = set(tensors)
    lacking = [name for name in names if name not in known]
    raise MaskFileError(
        f"the model lacks {len(lacking)} masked parameters: {lacking[:5]}; it is another architecture"
    )
