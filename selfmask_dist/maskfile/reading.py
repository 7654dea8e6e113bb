"""The masks of an open file, decoded when they are asked for, and whether weights are those of a mask.

A fingerprint is of exact values, so weights that were rounded to half precision have another one. A mask can
hold the fingerprints of its weights in half precision beside their own, and a model in full precision can be
rounded to see whether a mask was trained on it in half. Files that runs write do not hold them. `file` says
what a file is.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selfmask_dist.backbones import fingerprint
from selfmask_dist.common.fingerprint import Digest
from selfmask_dist.maskfile import codec, container, forms
from selfmask_dist.maskfile.container import Container
from selfmask_dist.maskfile.mask import Mask, MaskFileError, WithoutWeightsError

Weights = Callable[[str], Tensor]  # the frozen weights, by a parameter's name
HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class Reading:
    """The masks of an open file; bits are decoded once, and a mask against another after that one."""

    def __init__(self, whole: Container, weights: Weights | None) -> None:
        self._whole = whole
        self._masks: dict[str, Any] = whole.header["masks"]
        self._weights = weights
        self._done: dict[tuple[str, str], Tensor] = {}
        self._checked: set[str] = set()
        self._parameters: dict[str, dict[str, Any]] = {}
        self.order: list[str] = whole.header["order"]
        if sorted(self.order) != sorted(self._masks) or not self.order:
            raise ValueError("order and masks name different masks, or none")

    def parameters(self, mask: str) -> dict[str, Any]:
        """Return a mask's parameters as the header describes them, by name."""
        if mask not in self._parameters:
            self._parameters[mask] = {entry["name"]: entry for entry in self._masks[mask]["parameters"]}
        return self._parameters[mask]

    def mask(self, name: str, only: str | None = None) -> Mask:
        """Return a mask, or what it is for one parameter; the first one brings the statistics."""
        described = self._masks[name]
        kind, scale = described["kind"], described["scale"]
        if kind not in forms.KINDS or scale not in ("sqrt", "none", "stated"):
            raise ValueError(f"unknown mask kind {kind!r} with scale {scale!r}")
        if (scale == "stated") != (kind in forms.NUM_SCALES):
            raise ValueError(f"mask kind {kind!r} cannot have scale {scale!r}")
        entries = self.parameters(name)
        with_statistics = only in (None, next(iter(entries), None))
        entries = entries if only is None else {only: entries[only]}
        bits = {parameter: self.bits(name, parameter) for parameter in entries}
        return Mask(
            bits=bits,
            weights_fingerprint=described["weights_fingerprint"],
            scaled=described["scale"] == "sqrt",
            num_segments={
                parameter: len(entry["kept"])
                for parameter, entry in entries.items()
                if len(entry["kept"]) > 1
            },
            statistics={
                entry["name"]: container.parse_array(entry, self._whole)
                for entry in (described["statistics"] if with_statistics else ())
            },
            threshold=described["threshold"],
            against=described.get("against"),
            kind=kind,
            **self._parts(kind, entries, bits),
            blocks={key: tuple(entry["block"]) for key, entry in entries.items() if "block" in entry},
            rounded=_rounded(described),
        )

    def forget(self) -> None:
        """Let go of decoded bits, which are kept for masks that are stored against them."""
        self._done.clear()

    def _parts(self, kind: str, entries: Mapping[str, Any], bits: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return what a kind has beside bits: signs, scales and values, by parameter."""
        parts: dict[str, dict[str, Tensor]] = {}
        for key, entry in entries.items():
            if kind in forms.WITH_SIGNS:
                coded = self._whole.section(entry["signs"])
                signs = torch.zeros_like(bits[key])
                decoded = codec.decode(coded, int(bits[key].sum()), entry["codec"])
                signs[bits[key]] = torch.from_numpy(decoded)
                parts.setdefault("signs", {})[key] = signs
            if kind in forms.NUM_SCALES:
                shape = (len(entry["kept"]), forms.NUM_SCALES[kind])
                parts.setdefault("scales", {})[key] = container.parse_scales(key, entry["scales"], shape)
            if kind in forms.WITH_VALUES:
                values = container.parse_array(entry["values"], self._whole)
                if values.shape != (sum(entry["kept"]),) or not values.is_floating_point():
                    raise ValueError(
                        f"{key}: {tuple(values.shape)} values of {values.dtype} for the kept weights"
                    )
                parts.setdefault("values", {})[key] = values
            if kind in forms.KEEPS_ALL and not bits[key].all():
                raise ValueError(f"{key}: weights are left out, and a {kind} mask has none to leave out")
        return parts

    def bits(self, mask: str, parameter: str) -> Tensor:
        """Return the bits of a parameter, bool, of its shape."""
        if (mask, parameter) in self._done:
            return self._done[mask, parameter]
        entry = self.parameters(mask)[parameter]
        shape, kept = entry["shape"], entry["kept"]
        block = tuple(entry["block"]) if "block" in entry else None
        stored = shape if block is None else list(forms.grid_shape(shape, block))
        array = codec.decode(
            self._whole.section(entry["section"]),
            container.count_values(stored),
            entry["codec"],
            classes=self._classes(mask, entry),
        )
        bits = torch.from_numpy(array.reshape(stored))
        if block is not None:
            bits = forms.from_grid(bits, shape, block)
        if not kept or [int(piece.sum()) for piece in bits.chunk(len(kept))] != kept:
            raise ValueError(f"{parameter}: the count of kept weights differs from the header's")
        self._done[mask, parameter] = bits
        return bits

    def _classes(self, mask: str, entry: Mapping[str, Any]) -> np.ndarray | None:
        context, parameter = entry.get("context"), entry["name"]
        if context is None:
            return None
        if "block" in entry:
            raise ValueError(f"{parameter}: blocks are coded by themselves, and it has a context {context!r}")
        if context == "mask":
            against = self._masks[mask]["against"]
            if self.order.index(against) >= self.order.index(mask):
                raise ValueError(
                    f"mask {mask!r} is stored against {against!r}, which does not come before it"
                )
            known = self.bits(against, parameter)
        elif context == "weights":
            known = self._checked_weights(mask)(parameter)
        else:
            raise ValueError(f"{parameter}: unknown context {context!r}")
        if list(known.shape) != entry["shape"]:
            raise ValueError(f"{parameter}: shape {entry['shape']} is not that of its context {context!r}")
        return classes(context, known)

    def _checked_weights(self, mask: str) -> Weights:
        """Return the frozen weights if they are the mask's: with others the bits would decode to nonsense."""
        if self._weights is None:
            raise WithoutWeightsError(
                "it was made smaller by its backbone's weights and cannot be read without them; apply it to "
                "the backbone, or give `weights=weights_of(backbone)`"
            )
        if mask not in self._checked:
            described = self._masks[mask]
            own = {name: self._weights(name) for name in self.parameters(mask)}
            found, expected = fingerprint(own.items()), described["weights_fingerprint"]
            if found != expected:
                other = other_precision(own, expected, found, _rounded(described))
                if other is not None:
                    raise MaskFileError(
                        f"it is the same backbone in another precision ({other}), and the file was made "
                        f"smaller by the weights as they were trained: its bits cannot be decoded with "
                        f"rounded ones. Read it with those weights and convert the model then, or save the "
                        f"mask without against_weights"
                    )
                raise MaskFileError(wrong_backbone(own, found, expected))
            self._checked.add(mask)
        return self._weights


def _rounded(described: Mapping[str, Any]) -> dict[str, str]:
    return {str(dtype): str(value) for dtype, value in described.get("rounded_fingerprints", {}).items()}


def classes(context: str, known: Tensor) -> np.ndarray:
    """Return which places of a parameter are alike, uint8, by the bits of another mask or by the weights."""
    if context == "mask":
        return known.numpy().view(np.uint8)
    return codec.magnitude_classes(known.detach().to(device="cpu", dtype=torch.float32).numpy())


# ---- whose weights


def fingerprints(named: Iterable[tuple[str, Tensor]], *, with_rounded: bool) -> tuple[str, dict[str, str]]:
    """Return the fingerprint of weights, and those of what they are in each half precision, by dtype.

    Args:
        named: in sorted order of their names; each is let go before the next is asked for.
        with_rounded: without, and of weights that are in half precision already, there are none.
    """
    own = Digest()
    rounded = {name: Digest() for name in HALVES} if with_rounded else {}
    for key, tensor in named:
        own.update(key, tensor)
        if tensor.dtype in HALVES.values():
            rounded = {}
        for name, found in rounded.items():
            found.update(key, tensor.to(HALVES[name]))
    return own.hexdigest(), {name: found.hexdigest() for name, found in rounded.items()}


def other_precision(
    weights: Mapping[str, Tensor], expected: str, found: str, rounded: Mapping[str, str]
) -> str | None:
    """Return how weights are the same as a mask's in another precision; None where they are not.

    Args:
        weights: of the model, by the mask's names.
        expected, found: fingerprints of the mask's weights and of these.
        rounded: what the mask has of `rounded_fingerprints`.
    """
    for name, dtype in HALVES.items():
        if rounded.get(name) == found:
            return f"the model is {name}, the mask was trained on float32"
        if all(tensor.dtype != dtype for tensor in weights.values()) and expected == fingerprint(
            (key, tensor.to(dtype)) for key, tensor in weights.items()
        ):
            return f"the mask was trained on {name}, the model is {_dtypes(weights)}"
    return None


def wrong_backbone(weights: Mapping[str, Tensor], found: str, expected: str) -> str:
    """Return the message of weights that are none of a mask's."""
    text = (
        f"wrong backbone: the model's weights under the mask have fingerprint {found[:12]}, the mask was "
        f"trained on {expected[:12]}"
    )
    if all(tensor.dtype in HALVES.values() for tensor in weights.values()):
        return (
            f"{text}. The model is {_dtypes(weights)}: rounded weights have another fingerprint, and this "
            f"file does not say which. Apply the mask to the same pretrained weights in float32, with no "
            f"mask applied yet, and convert the model then"
        )
    return f"{text}; load the same pretrained weights, with no mask applied yet"


def _dtypes(weights: Mapping[str, Tensor]) -> str:
    return ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in weights.values()}))
