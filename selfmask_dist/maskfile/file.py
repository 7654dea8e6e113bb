"""Masks to a file and back: what header and sections of a mask file mean.

`docs/mask_format.md` is the specification. A reader believes no number before it is checked, and allocates
nothing that a limit does not allow.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selfmask_dist.backbones import fingerprint
from selfmask_dist.maskfile import codec, container, forms, precision
from selfmask_dist.maskfile.container import Container, Sections
from selfmask_dist.maskfile.mask import Mask, MaskFile, MaskFileError, WithoutWeightsError

MAX_WEIGHTS = 4 * 10**9  # of all masks of a file together: a byte each while they are read
_MAX_VERDICT = 500  # characters
Weights = Callable[[str], Tensor]  # the frozen weights, by a parameter's name

_MISTAKES = (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError)


def write_mask_file(
    path: str | Path, file: MaskFile, *, codec_name: str = codec.DEFAULT, weights: Weights | None = None
) -> int:
    """Write `file` to `path` by way of a temporary name and one rename; returns the number of bytes.

    Args:
        codec_name: `entropy`, the smallest, or `packbits-zstd`, which everyday tools can read.
        weights: the frozen weights. With them the file is smaller, as large weights are pruned more often,
            and cannot be read without them.

    Raises:
        MaskFileError: a statistic has a dtype the format does not hold, or a mask is to be coded against
            something that its kind leaves no use for.
    """
    if bad := {name: value for name, value in file.metrics.items() if not math.isfinite(value)}:
        raise MaskFileError(f"metrics that are not finite numbers are not stored: {bad}; leave them out")
    sections = Sections()
    header = {
        "backbone": {"name": file.backbone, "fingerprint": file.backbone_fingerprint},
        "preprocessing": file.preprocessing,
        "metrics": file.metrics,
        **({"verdict": file.verdict} if file.verdict else {}),
        "masks": {
            name: _describe_mask(mask, sections, file.masks, codec_name, weights)
            for name, mask in file.masks.items()
        },
        "order": list(file.masks),
        "tensors": [
            container.describe_array(name, tensor, sections) for name, tensor in file.tensors.items()
        ],
    }
    has_forms = any(mask.kind != "threshold" or mask.blocks for mask in file.masks.values())
    version = container.VERSION_WITH_FORMS if has_forms else container.VERSION
    return container.write(Path(path), header, sections, version=version)


def read_mask_file(
    path: str | Path, *, weights: Weights | None = None, max_weights: int = MAX_WEIGHTS
) -> MaskFile:
    """Read and verify a mask file.

    Args:
        weights: the frozen weights, for a file written with them; `weights_of` finds them in a model.
        max_weights: a file that states more than this is refused before anything is allocated.

    Raises:
        MaskFileError: not a mask file, another version, damaged in any byte, too large, or without the
            weights that it takes.
        FileNotFoundError: no such file.
    """
    whole = container.read(Path(path))
    try:
        header = whole.header
        reading = _Reading(whole, weights)
        entries = [
            entry for mask in header["masks"].values() for entry in (*mask["parameters"], *mask["statistics"])
        ]
        signed = [entry for entry in entries if "signs" in entry]
        places = sum(
            container.count_values(entry["shape"]) for entry in [*entries, *signed, *header["tensors"]]
        )
        container.check_size(places, max_weights)
        return MaskFile(
            masks={name: reading.mask(name) for name in reading.order},
            tensors={entry["name"]: container.parse_array(entry, whole) for entry in header["tensors"]},
            backbone=header["backbone"]["name"],
            backbone_fingerprint=header["backbone"]["fingerprint"],
            preprocessing=header["preprocessing"],
            metrics=header["metrics"],
            verdict=_one_line(str(header.get("verdict", ""))),
        )
    except _MISTAKES as error:
        raise _refusal(path, error) from error


def read_backbone_name(path: str | Path) -> str:
    """Return the name of the backbone that a mask file is of, empty where it is not stated.

    Only the header is read.

    Raises:
        MaskFileError: as in `read_mask_file`, for the header.
    """
    try:
        return str(container.open_part(Path(path)).header["backbone"]["name"])
    except _MISTAKES as error:
        raise _refusal(path, error) from error


def verify_mask_file(path: str | Path, *, max_weights: int = MAX_WEIGHTS) -> str:
    """Check every byte, and that what can be decoded without the backbone decodes; returns what was checked.

    Raises:
        MaskFileError: as in `read_mask_file`, but for weights that are not given.
    """
    try:
        file = read_mask_file(path, max_weights=max_weights)
    except WithoutWeightsError:
        return "checksums hold; its bits were not decoded, which takes its backbone"
    count = sum(mask.num_weights() for mask in file.masks.values())
    return f"whole; {len(file.masks)} masks of {count:,} weights in all"


def _one_line(text: str) -> str:
    """Return what a terminal can be given of a stranger's text: printable, in one line of some length."""
    return "".join(c for c in " ".join(text.split()) if c.isprintable())[:_MAX_VERDICT]


def _refusal(path: str | Path, error: Exception) -> MaskFileError:
    if isinstance(error, MaskFileError):
        return error if str(path) in str(error) else type(error)(f"{path}: {error}")
    return MaskFileError(f"{path} has an inconsistent header or section: {error}")


# ---- writing


def _describe_mask(
    mask: Mask, sections: Sections, masks: Mapping[str, Mask], codec_name: str, weights: Weights | None
) -> dict[str, Any]:
    _check_contexts(mask, weights)
    base = {} if mask.against is None else masks[mask.against].bits
    parameters = []
    for name, bits in mask.bits.items():
        block = mask.blocks.get(name)
        stored = bits if block is None else forms.to_grid(bits, block, name)
        coded, context = codec.encode(stored.numpy(), codec_name), None
        known = {"mask": base.get(name), "weights": weights(name) if weights else None}
        for kind, tensor in known.items():
            if tensor is not None and codec_name == codec.DEFAULT:
                smaller = codec.encode(bits.numpy(), classes=_classes(kind, tensor))
                coded, context = min((coded, context), (smaller, kind), key=lambda pair: len(pair[0]))
        parameters.append(
            {
                "name": name,
                "shape": list(bits.shape),
                # per scaled segment: a = sqrt(N / kept)
                "kept": [int(piece.sum()) for piece in bits.chunk(mask.num_segments.get(name, 1))],
                "codec": codec_name,
                "section": sections.add(coded),
                **({"context": context} if context else {}),
                **({"block": list(block)} if block else {}),
                **_describe_parts(mask, name, sections, codec_name),
            }
        )
    return {
        **({"against": mask.against} if mask.against is not None else {}),
        "kind": mask.kind,
        "threshold": mask.threshold,
        "scale": "stated" if mask.kind in forms.NUM_SCALES else "sqrt" if mask.scaled else "none",
        "weights_fingerprint": mask.weights_fingerprint,
        **({"rounded_fingerprints": mask.rounded} if mask.rounded else {}),
        "parameters": parameters,
        "statistics": [
            container.describe_array(name, tensor, sections) for name, tensor in mask.statistics.items()
        ],
    }


def _describe_parts(mask: Mask, name: str, sections: Sections, codec_name: str) -> dict[str, Any]:
    """Return what a kind has beside bits."""
    parts: dict[str, Any] = {}
    if mask.kind in forms.WITH_SIGNS:
        signs = mask.signs[name][mask.bits[name]]  # where nothing is kept there is no sign
        parts["signs"] = sections.add(codec.encode(signs.numpy(), codec_name))
    if mask.kind in forms.NUM_SCALES:
        parts["scales"] = mask.scales[name].tolist()
    if mask.kind in forms.WITH_VALUES:
        parts["values"] = container.describe_array(name, mask.values[name], sections)
    return parts


def _check_contexts(mask: Mask, weights: Weights | None) -> None:
    """Check that bits which are to be coded by others are bits of single weights, and not all alike."""
    if mask.kind != "sign" and not mask.blocks:
        return
    what = "every weight is kept" if mask.kind == "sign" else "a bit belongs to a block of weights"
    if mask.against is not None:
        raise MaskFileError(
            f"{what}, so it cannot be coded against mask {mask.against!r}; store it by itself"
        )
    if weights is not None:
        raise MaskFileError(f"{what}, which the weights tell nothing about; store it without them")


def _rounded(described: Mapping[str, Any]) -> dict[str, str]:
    return {str(dtype): str(value) for dtype, value in described.get("rounded_fingerprints", {}).items()}


def _classes(context: str, known: Tensor) -> np.ndarray:
    if context == "mask":
        return known.numpy().view(np.uint8)
    return codec.magnitude_classes(known.detach().to(device="cpu", dtype=torch.float32).numpy())


# ---- reading


class _Reading:
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
            if kind == "sign" and not bits[key].all():
                raise ValueError(f"{key}: weights are left out, and a sign mask has none to leave out")
        return parts

    def bits(self, mask: str, parameter: str) -> Tensor:
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
        return _classes(context, known)

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
                other = precision.other_precision(own, expected, found, _rounded(described))
                if other is not None:
                    raise MaskFileError(
                        f"it is the same backbone in another precision ({other}), and the file was made "
                        f"smaller by the weights as they were trained: its bits cannot be decoded with "
                        f"rounded ones. Read it with those weights and convert the model then, or save the "
                        f"mask without against_weights"
                    )
                raise MaskFileError(precision.wrong_backbone(own, found, expected))
            self._checked.add(mask)
        return self._weights
