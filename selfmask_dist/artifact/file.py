"""Masks to a file and back: what header and sections of a mask file mean.

`docs/mask_format.md` is the specification. A reader believes no number before it is checked, and allocates
nothing that a limit does not allow.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selfmask_dist.artifact import codec, container
from selfmask_dist.artifact.container import Container, Sections
from selfmask_dist.artifact.mask import Mask, MaskFile, MaskFileError, WithoutWeightsError
from selfmask_dist.backbones import fingerprint

MAX_WEIGHTS = 4 * 10**9  # of all masks of a file together: a byte each while they are read
Weights = Callable[[str], Tensor]  # the frozen weights, by a parameter's name

_ARRAY_DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(name).newbyteorder("<")
    for name in ("float16", "float32", "float64", "int64", "uint8", "bool")
}
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
        MaskFileError: a statistic has a dtype the format does not hold.
    """
    sections = Sections()
    header = {
        "backbone": {"name": file.backbone, "fingerprint": file.backbone_fingerprint},
        "preprocessing": file.preprocessing,
        "metrics": file.metrics,
        "masks": {
            name: _describe_mask(mask, sections, file.masks, codec_name, weights)
            for name, mask in file.masks.items()
        },
        "order": list(file.masks),
        "tensors": [_describe_array(name, tensor, sections) for name, tensor in file.tensors.items()],
    }
    return container.write(Path(path), header, sections)


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
        _check_size(sum(_count(entry["shape"]) for entry in [*entries, *header["tensors"]]), max_weights)
        return MaskFile(
            masks={name: reading.mask(name) for name in reading.order},
            tensors={entry["name"]: _parse_array(entry, whole) for entry in header["tensors"]},
            backbone=header["backbone"]["name"],
            backbone_fingerprint=header["backbone"]["fingerprint"],
            preprocessing=header["preprocessing"],
            metrics=header["metrics"],
        )
    except _MISTAKES as error:
        raise _refusal(path, error) from error


def read_backbone_name(path: str | Path) -> str:
    """The name of the backbone that a mask file is of, empty where it is not stated; reads the header alone.

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


def read_parameter(
    path: str | Path,
    parameter: str,
    *,
    mask: str | None = None,
    weights: Weights | None = None,
    max_weights: int = MAX_WEIGHTS,
) -> Tensor:
    """The bits of one parameter, bool of its shape; of the file, only header and what it needs are read.

    Args:
        mask: which mask, where the file holds several.

    Raises:
        MaskFileError: as in `read_mask_file`, for the part that is read; no such mask or parameter.
    """
    try:
        reading = _Reading(container.open_part(Path(path)), weights)
        name = mask or reading.order[0]
        if name not in reading.order or (mask is None and len(reading.order) > 1):
            raise MaskFileError(f"it holds the masks {reading.order}; name one of them")
        entry = reading.parameters(name).get(parameter)
        if entry is None:
            known = ", ".join(list(reading.parameters(name))[:5])
            raise MaskFileError(f"mask {name!r} has no parameter {parameter!r}; it has {known} ...")
        _check_size(_count(entry["shape"]), max_weights)
        return reading.bits(name, parameter)
    except _MISTAKES as error:
        raise _refusal(path, error) from error


def _refusal(path: str | Path, error: Exception) -> MaskFileError:
    if isinstance(error, MaskFileError):
        return error if str(path) in str(error) else type(error)(f"{path}: {error}")
    return MaskFileError(f"{path} has an inconsistent header or section: {error}")


# ---- writing


def _describe_mask(
    mask: Mask, sections: Sections, masks: Mapping[str, Mask], codec_name: str, weights: Weights | None
) -> dict[str, Any]:
    parameters = []
    base = {} if mask.against is None else masks[mask.against].bits
    for name, bits in mask.bits.items():
        coded, context = codec.encode(bits.numpy(), codec_name), None
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
            }
        )
    return {
        **({"against": mask.against} if mask.against is not None else {}),
        "kind": "threshold",
        "threshold": mask.threshold,
        "scale": "sqrt" if mask.scaled else "none",
        "weights_fingerprint": mask.weights_fingerprint,
        "parameters": parameters,
        "statistics": [_describe_array(name, tensor, sections) for name, tensor in mask.statistics.items()],
    }


def _describe_array(name: str, tensor: Tensor, sections: Sections) -> dict[str, Any]:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in _ARRAY_DTYPES:
        raise MaskFileError(
            f"statistic {name} has dtype {dtype}; a mask file holds {', '.join(_ARRAY_DTYPES)}"
        )
    data = tensor.contiguous().numpy().astype(_ARRAY_DTYPES[dtype]).tobytes()
    return {"name": name, "shape": list(tensor.shape), "dtype": dtype, "section": sections.add(data)}


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
        """Their entries in the header, by name."""
        if mask not in self._parameters:
            self._parameters[mask] = {entry["name"]: entry for entry in self._masks[mask]["parameters"]}
        return self._parameters[mask]

    def mask(self, name: str) -> Mask:
        described = self._masks[name]
        if described["kind"] != "threshold" or described["scale"] not in ("sqrt", "none"):
            raise ValueError(f"unknown mask kind {described['kind']!r} with scale {described['scale']!r}")
        entries = self.parameters(name)
        return Mask(
            bits={parameter: self.bits(name, parameter) for parameter in entries},
            weights_fingerprint=described["weights_fingerprint"],
            scaled=described["scale"] == "sqrt",
            num_segments={
                parameter: len(entry["kept"])
                for parameter, entry in entries.items()
                if len(entry["kept"]) > 1
            },
            statistics={entry["name"]: _parse_array(entry, self._whole) for entry in described["statistics"]},
            threshold=described["threshold"],
            against=described.get("against"),
        )

    def bits(self, mask: str, parameter: str) -> Tensor:
        if (mask, parameter) in self._done:
            return self._done[mask, parameter]
        entry = self.parameters(mask)[parameter]
        shape, kept = entry["shape"], entry["kept"]
        array = codec.decode(
            self._whole.section(entry["section"]),
            _count(shape),
            entry["codec"],
            classes=self._classes(mask, entry),
        )
        bits = torch.from_numpy(array.reshape(shape))
        if not kept or [int(piece.sum()) for piece in bits.chunk(len(kept))] != kept:
            raise ValueError(f"{parameter}: the count of kept weights differs from the header's")
        self._done[mask, parameter] = bits
        return bits

    def _classes(self, mask: str, entry: Mapping[str, Any]) -> np.ndarray | None:
        context, parameter = entry.get("context"), entry["name"]
        if context is None:
            return None
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
        """The frozen weights, if they are those of the mask: with others it would decode to nonsense."""
        if self._weights is None:
            raise WithoutWeightsError(
                "it was made smaller by its backbone's weights and cannot be read without them; apply it to "
                "the backbone, or give `weights=weights_of(backbone)`"
            )
        if mask not in self._checked:
            weights, expected = self._weights, self._masks[mask]["weights_fingerprint"]
            found = fingerprint((name, weights(name)) for name in self.parameters(mask))
            if found != expected:
                raise MaskFileError(
                    f"wrong backbone: its weights under the mask have fingerprint {found[:12]}, the mask was "
                    f"trained on {expected[:12]}; load the same pretrained weights, with no mask applied yet"
                )
            self._checked.add(mask)
        return self._weights


def _parse_array(entry: Mapping[str, Any], whole: Container) -> Tensor:
    data, dtype = whole.section(entry["section"]), _ARRAY_DTYPES[entry["dtype"]]
    if len(data) != _count(entry["shape"]) * dtype.itemsize:
        raise ValueError(f"{entry['name']}: {len(data)} bytes do not make shape {entry['shape']}")
    if entry["dtype"] == "bool" and data.strip(b"\0\1"):
        raise ValueError(f"{entry['name']}: a truth value is neither 0 nor 1")
    return torch.from_numpy(np.frombuffer(data, dtype).reshape(entry["shape"]).copy())


def _count(shape: Any) -> int:
    """Places of a shape; a product of Python's integers, which does not overflow."""
    count = 1
    if not isinstance(shape, list) or len(shape) > 16:
        raise ValueError(f"bad shape {str(shape)[:80]}")
    for size in shape:
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 2**40:
            raise ValueError(f"bad shape {str(shape)[:80]}")
        count *= size
    return count


def _check_size(count: int, most: int) -> None:
    if count > most:
        raise MaskFileError(
            f"it holds {count:,} values, more than the limit of {most:,}; max_weights= raises it"
        )
