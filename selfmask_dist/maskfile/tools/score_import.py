"""Masks out of real-valued scores that other code trained, as Piggyback's (Mallya et al. 2018, 1801.06519).

    M = 1[S > mu]        theta = W * M        S: `<module>.mask_real` beside <module>'s weight, mu = 0.005

`backbones.weights.read_state_dict` reads the file, and executes nothing in it. Its frozen weights, where it
has them, must be the backbone's; running statistics that moved come along.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from selfmask_dist.backbones import fingerprint
from selfmask_dist.maskfile import Mask
from selfmask_dist.masking import binarize

KEY = "mask_real"
THRESHOLD = 5e-3


@dataclass(frozen=True)
class Imported:
    """A mask, and the names in the file that are no part of the encoder (a head, say)."""

    mask: Mask
    left_out: list[str]


def import_scores(
    state: Mapping[str, Tensor],
    encoder: nn.Module,
    *,
    key: str = KEY,
    threshold: float = THRESHOLD,
    scaled: bool = False,
) -> Imported:
    """Return a mask of `encoder`, which holds the frozen weights, made of the scores in `state`.

    Args:
        key: what a module calls its scores; they belong to its `weight`.
        threshold: mu.
        scaled: theta = a W M of this project in place of Piggyback's W M.

    Raises:
        ValueError: there are no scores, they fit other names or shapes, are not finite, or the state has
            other weights than the encoder.
    """
    scores = {name: value for name, value in state.items() if name.endswith(f".{key}")}
    if not scores:
        raise ValueError(
            f"there are no scores among the {len(state)} tensors: none is called *.{key}, but "
            f"{', '.join(list(state)[:5]) or 'nothing'}; name them with --key"
        )
    ours = {**dict(encoder.named_parameters()), **dict(encoder.named_buffers())}
    prefix = _prefix([name.removesuffix(key) + "weight" for name in scores], ours)
    bits: dict[str, Tensor] = {}
    for name, value in scores.items():
        target = name.removeprefix(prefix).removesuffix(key) + "weight"
        shape = tuple(ours[target].shape)
        if value.shape != shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, and {target} of the backbone {shape}")
        if not value.isfinite().all():
            raise ValueError(f"{name} holds values that are not finite: such scores say nothing")
        bits[target] = binarize(value, threshold)
    bits = {name: bits[name] for name in ours if name in bits}  # in the encoder's order
    rest = {name.removeprefix(prefix): value for name, value in state.items() if name not in scores}
    statistics = _moved(rest, ours, {name for name, _ in encoder.named_buffers()})
    return Imported(
        mask=Mask(
            bits,
            fingerprint((name, ours[name]) for name in bits),
            scaled=scaled,
            statistics=statistics,
            threshold=threshold,
        ),
        left_out=[name for name in rest if name not in ours],
    )


def _prefix(targets: list[str], ours: Mapping[str, Tensor]) -> str:
    """Return what the file puts before the encoder's names (`shared.`), so that all of them are there."""
    parts = targets[0].split(".")
    prefixes = ["".join(f"{part}." for part in parts[:count]) for count in range(len(parts))]
    for prefix in prefixes:
        if all(name.startswith(prefix) and name.removeprefix(prefix) in ours for name in targets):
            return prefix
    lacking = [name for name in targets if not any(name.removeprefix(prefix) in ours for prefix in prefixes)]
    raise ValueError(
        f"the backbone has no parameters for scores of {', '.join(lacking[:3] or targets[:3])}; it has "
        f"{', '.join(list(ours)[:3])}, ...: is it another architecture?"
    )


def _moved(state: Mapping[str, Tensor], ours: Mapping[str, Tensor], buffers: set[str]) -> dict[str, Tensor]:
    """Return the buffers that differ from the encoder's.

    Raises:
        ValueError: a parameter differs.
    """
    moved = {}
    for name, value in state.items():
        if name not in ours or torch.equal(value.to(ours[name].dtype), ours[name].cpu()):
            continue
        if name not in buffers:
            raise ValueError(
                f"{name} of the file is not the backbone's: it was trained beside the masks (no mask file "
                f"holds that), or the backbone has other pretrained weights"
            )
        moved[name] = value.to(ours[name].dtype)
    return moved
