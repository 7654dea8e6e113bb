"""A mask on a model: taken from masks in training, checked against a backbone, and put on it."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from selfmask_dist.backbones import fingerprint
from selfmask_dist.backbones.libraries.views import translations
from selfmask_dist.common.tensor_names import placements, plain_names
from selfmask_dist.maskfile.file import read_mask_file
from selfmask_dist.maskfile.forms import as_kind, materialize, take_apart
from selfmask_dist.maskfile.mask import MarkedMaskWarning, Mask, MaskFile, MaskFileError
from selfmask_dist.maskfile.model.part import Model
from selfmask_dist.maskfile.naming import translated
from selfmask_dist.maskfile.reading import Weights, fingerprints, other_precision, wrong_backbone
from selfmask_dist.masking import AttachedMasks, marks
from selfmask_dist.masking.marks import describe_left_over


@dataclass(frozen=True)
class Gathered:
    """One parameter of masks in training, whole: its bits; theta and frozen weight where they are needed."""

    name: str
    bits: Tensor
    theta: Tensor | None
    weight: Tensor | None


def from_masks(masks: AttachedMasks, *, with_rounded: bool = False) -> Mask:
    """Return masks in training as a file holds them. Collective where they are sharded: every rank must call.

    Every rank then holds a byte for each weight. `api.save_masks` writes a file without.

    Names are those of the model without the parts that wrappers add (`module.`, `_orig_mod.`).

    Args:
        with_rounded: with the fingerprints of the weights in half precision.

    Raises:
        MaskFileError: a family's form does not hold its theta.
        ValueError: the scores are not what training made of them (`Masks.check_current`).
    """
    mask = without_bits(masks, with_rounded=with_rounded)
    for part in one_by_one(mask, gather(masks)):
        for field in ("bits", "signs", "scales", "values"):
            getattr(mask, field).update(getattr(part, field))
    return mask


def without_bits(masks: AttachedMasks, *, with_rounded: bool = False, is_kept: bool = True) -> Mask:
    """Return all of a mask but what `one_by_one` adds of each parameter. Collective where they are sharded.

    The weights are gathered, hashed and let go one after the other.

    Args:
        is_kept: False only takes part in gathering, and returns no fingerprints.

    Raises:
        As `from_masks`.
    """
    masks.check_current()
    moved, plain, kind = masks.moved_statistics(), _plain(masks), as_kind(masks.family.form)
    by_name = sorted(masks.entries, key=lambda entry: plain[entry.name])
    weights = ((plain[entry.name], masks.whole_first_weight(entry)) for entry in by_name)
    own, rounded = "", dict[str, str]()
    if is_kept:
        own, rounded = fingerprints(weights, with_rounded=with_rounded)
        own = masks.origin or own  # the file is for the weights as they came
    for _ in weights:  # those that this rank only helps to gather
        pass
    return Mask(
        bits={},
        weights_fingerprint=own,
        scaled=masks.family.is_scaled,
        num_segments={
            plain[entry.name]: entry.num_segments for entry in masks.entries if entry.num_segments > 1
        },
        kind=kind,
        blocks={plain[name]: block for name, block in _blocks(masks).items()},
        statistics={plain[name]: statistic.cpu() for name, statistic in moved.items()},
        threshold=masks.threshold,
        rounded=rounded,
    )


def gather(masks: AttachedMasks, *, is_kept: bool = True, with_weights: bool = False) -> Iterator[Gathered]:
    """Yield what a file holds of one parameter after the other, on the CPU. Collective where masks are
    sharded: every rank must go through to the end.

    Args:
        is_kept: False only takes part in gathering, and yields nothing.
        with_weights: with the frozen weights, whatever the kind.
    """
    plain, has_parts = _plain(masks), as_kind(masks.family.form) != "threshold"
    for entry, (name, piece) in zip(masks.entries, masks.each_mask_piece(), strict=True):
        bits = masks.whole_mask(name, piece)
        theta = masks.whole_theta(entry) if has_parts else None
        weight = masks.whole_first_weight(entry) if has_parts or with_weights else None
        if is_kept:
            yield Gathered(plain[name], bits.cpu(), _on_cpu(theta), _on_cpu(weight))


def one_by_one(mask: Mask, parameters: Iterable[Gathered]) -> Iterator[Mask]:
    """Yield a mask of each parameter alone, out of what `without_bits` and `gather` gave.

    Raises:
        MaskFileError: a family's form does not hold its theta.
    """
    for found in parameters:
        parts: dict[str, Any] = {}
        if found.theta is not None and found.weight is not None:
            num_parts = mask.num_segments.get(found.name, 1)
            taken = take_apart(mask.kind, found.theta, found.bits, found.weight, num_parts=num_parts)
            parts = {part: {found.name: tensor} for part, tensor in taken.items()}
        yield replace(mask, bits={found.name: found.bits}, **parts)


def _on_cpu(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.cpu()


def _plain(masks: AttachedMasks) -> dict[str, str]:
    return plain_names([*(entry.name for entry in masks.entries), *masks.moved_statistics()])


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
def apply_mask(model: nn.Module, mask: Mask, *, what: str = "a mask that was applied") -> None:
    """Write theta (a * W * M, or what the mask's kind says) and the moved statistics into `model`.

    The model holds the frozen weights W, in the precision that the mask was trained in or another one. It may
    be the encoder itself or hold it under a prefix (`visual.` of a whole open_clip model, `module.`); other
    parameters, such as a head, are left alone. It may be another library's model of the same weights, where
    `backbones.libraries` knows both libraries' names.

    Raises:
        MaskFileError: a masked parameter is missing or has another shape, the weights are not those of the
            mask, or the model carries masks already.
    """
    _check_is_free(model)
    held = _held(model)
    other = None if placements(list(mask.bits), held) else translated.find(mask, held)
    if other is not None:
        translated.put(model, held, mask, other, what=what)
        return
    fitting = fit(model, mask)
    for name in mask.bits:
        weight = fitting.tensors[name]
        theta = materialize(mask, name, weight)
        marks.put(model, fitting.names[name], marks.record(f"theta of {what}", theta, weight))
        weight.copy_(theta)
    for name, statistic in mask.statistics.items():
        fitting.tensors[name].copy_(statistic)


def weights_of(model: nn.Module) -> Weights:
    """Return a function from the names that a mask has for a backbone's weights to those weights.

    Args:
        model: the backbone itself, or a model that holds it under a prefix, or wrapped.

    Raises:
        MaskFileError: when asked for a name that is not there, or there more than once.
    """
    tensors = dict(model.named_parameters())

    def find(name: str) -> Tensor:
        found = placements([name], tensors)
        place = found[0].find(name) if len(found) == 1 else None
        if not found and (other := next(translations([name], tensors), None)) is not None:
            return other.read(tensors)[name]
        if place is None:
            raise MaskFileError(
                f"the model holds {len(found)} parameters called {name}; it is another architecture"
            )
        return tensors[place]

    return find


@dataclass(frozen=True)
class Fit:
    """Where a mask goes in a model.

    names: the model's own, by the mask's.
    tensors: that the mask writes, by the mask's names.
    fingerprint: of the model's weights under the mask.
    """

    names: dict[str, str]
    tensors: dict[str, Tensor]
    fingerprint: str


def check_fits(model: nn.Module, mask: Mask) -> dict[str, Tensor]:
    """Return the tensors of `model` that a mask writes, by the mask's names; errors as in `apply_mask`."""
    return fit(model, mask).tensors


def fit(model: nn.Module, mask: Mask, *, known: str | None = None) -> Fit:
    """Return where a mask goes in a model; errors as in `apply_mask`.

    Args:
        known: the fingerprint of the weights under the mask, where it was taken before.
    """
    _check_is_free(model)
    held = _held(model)
    names = _find_names(mask, held)
    weights = {name: held[names[name]] for name in mask.bits}
    found = known or fingerprint(weights.items())
    if found != mask.weights_fingerprint and not other_precision(
        weights, mask.weights_fingerprint, found, mask.rounded
    ):
        own = set(names.values())
        if written := {name: text for name, text in marks.left_over(model).items() if name in own}:
            raise MaskFileError(
                f"{describe_left_over(written)}. A mask goes on the pretrained weights, with no mask applied "
                f"yet"
            )
        raise MaskFileError(wrong_backbone(weights, found, mask.weights_fingerprint))
    return Fit(names, {name: held[place] for name, place in names.items()}, found)


def _check_is_free(model: nn.Module) -> None:
    if attached := marks.attached(model):
        raise MaskFileError(
            f"the model carries masks in training ({next(iter(attached))} and {len(attached) - 1} more); "
            f"call detach() on them, or selfmask_dist.detach(model), and then apply the mask"
        )


def _held(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers, under all of their names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _find_names(mask: Mask, held: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the model's names of what a mask writes, by the mask's names.

    Raises:
        MaskFileError: they are missing, there more than once, or of other shapes.
    """
    found = [
        {name: placement.find(name) for name in (*mask.bits, *mask.statistics)}
        for placement in placements(list(mask.bits), held)
    ]
    # one module under two names is one
    same = {tuple(id(held[place]) for place in names.values() if place): names for names in found}
    if not same:
        lacking = [name for name in mask.bits if name not in held]
        raise MaskFileError(
            f"the model lacks {len(lacking)} masked parameters: {lacking[:5]}; it is another architecture, "
            f"or a library's whose names are not known as those of the mask's (see backbones/libraries)"
        )
    fitting = [names for names in same.values() if not _other_shapes(names, mask, held)]
    if len(fitting) > 1:
        first = next(iter(mask.bits))
        raise MaskFileError(
            f"the model holds the masked parameters more than once, for example {first} as "
            f"{[names[first] for names in fitting]}; apply to the one submodule"
        )
    if not fitting:
        name, place = _other_shapes(next(iter(same.values())), mask, held)[0]
        raise MaskFileError(
            f"{name} has shape {tuple(held[place].shape)} in the model and {tuple(mask.bits[name].shape)} in "
            f"the mask; build the backbone as it was when the mask was trained"
        )
    if missing := [name for name, place in fitting[0].items() if place is None]:
        raise MaskFileError(f"the mask brings running statistics the model does not have: {missing[:5]}")
    return {name: place for name, place in fitting[0].items() if place is not None}


def _other_shapes(
    names: Mapping[str, str | None], mask: Mask, held: Mapping[str, Tensor]
) -> list[tuple[str, str]]:
    places = ((name, names[name]) for name in mask.bits)
    return [(name, place) for name, place in places if place and held[place].shape != mask.bits[name].shape]


def warn_of_verdict(file: MaskFile, path: str | Path) -> None:
    """Warn, in one line, of a mask whose own training found that it is of no use."""
    if file.verdict:
        warnings.warn(f"{path}: {file.verdict}", MarkedMaskWarning, stacklevel=3)


def describe_file(path: str | Path) -> str:
    """Return what a mask file holds, as text for a person; verifies it on the way."""
    file = read_mask_file(path)
    lines = [
        f"{path}: {Path(path).stat().st_size:,} bytes",
        f"backbone {file.backbone or 'not stated'}, fingerprint "
        f"{file.backbone_fingerprint[:12] or 'not stated'}",
        *(f"{name} {value:.4f}" for name, value in file.metrics.items()),
        *([f"VERDICT: {file.verdict}"] if file.verdict else []),
        *(_describe_model(name, model) for name, model in file.models.items()),
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


def _describe_model(name: str, model: Model) -> str:
    """Return what a file has beside a mask, as one line of printable text."""
    head = "no head" if model.head is None else f"a {model.head.kind} head of {len(model.classes)} classes"
    shown = [*model.classes[:5], *(["..."] if len(model.classes) > 5 else [])]
    told = [head, *([f"({', '.join(shown)})"] if shown else [])]
    told += [f"licence {model.licence}"] if model.licence else []
    text = f"model {name!r}: {' '.join(told)}"
    return "".join(c if c.isprintable() else " " for c in text)


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
