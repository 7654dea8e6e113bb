"""Masks to a file and back: what header and sections of a mask file mean.

`docs/mask_format.md` is the specification. A reader believes no number before it is checked, and allocates
nothing that a limit does not allow.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selfmask_dist.artifact import codec, container
from selfmask_dist.artifact.container import Container, Sections
from selfmask_dist.artifact.mask import Mask, MaskFile, MaskFileError

MAX_WEIGHTS = 4 * 10**9  # of all masks of a file together: a byte each while they are read
_ARRAY_DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(name).newbyteorder("<") for name in ("float32", "float64", "int64", "uint8", "bool")
}
_MISTAKES = (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError)


def write_mask_file(path: str | Path, file: MaskFile, *, codec_name: str = codec.DEFAULT) -> int:
    """Write `file` to `path` by way of a temporary name and one rename; returns the number of bytes.

    Args:
        codec_name: `entropy`, the smallest, or `packbits-zstd`, which everyday tools can read.

    Raises:
        MaskFileError: a statistic has a dtype the format does not hold.
    """
    sections = Sections()
    header = {
        "backbone": {"name": file.backbone, "fingerprint": file.backbone_fingerprint},
        "preprocessing": file.preprocessing,
        "metrics": file.metrics,
        "masks": {
            name: _describe_mask(mask, sections, file.masks, codec_name) for name, mask in file.masks.items()
        },
        "order": list(file.masks),
        "tensors": [_describe_array(name, tensor, sections) for name, tensor in file.tensors.items()],
    }
    return container.write(Path(path), header, sections)


def read_mask_file(path: str | Path, *, max_weights: int = MAX_WEIGHTS) -> MaskFile:
    """Read and verify a mask file.

    Args:
        max_weights: a file that states more than this is refused before anything is allocated.

    Raises:
        MaskFileError: not a mask file, another version, damaged in any byte, or too large.
        FileNotFoundError: no such file.
    """
    whole = container.read(Path(path))
    try:
        header = whole.header
        described = {name: header["masks"][name] for name in header["order"]}
        if described.keys() != header["masks"].keys():
            raise ValueError("order and masks name different masks")
        entries = [
            *(entry for mask in described.values() for entry in (*mask["parameters"], *mask["statistics"])),
            *header["tensors"],
        ]
        _check_size(sum(_count(entry["shape"]) for entry in entries), max_weights)
        masks: dict[str, Mask] = {}
        for name, mask in described.items():
            masks[name] = _parse_mask(mask, whole, masks)
        return MaskFile(
            masks=masks,
            tensors={entry["name"]: _parse_array(entry, whole) for entry in header["tensors"]},
            backbone=header["backbone"]["name"],
            backbone_fingerprint=header["backbone"]["fingerprint"],
            preprocessing=header["preprocessing"],
            metrics=header["metrics"],
        )
    except _MISTAKES as error:
        raise MaskFileError(f"{path} has an inconsistent header or section: {error}") from error


def read_parameter(
    path: str | Path, parameter: str, *, mask: str | None = None, max_weights: int = MAX_WEIGHTS
) -> Tensor:
    """The bits of one parameter, bool of its shape; of the file, only header and what it needs are read.

    Args:
        mask: which mask, where the file holds several.

    Raises:
        MaskFileError: as in `read_mask_file`, for the part that is read; no such mask or parameter.
    """
    part = container.open_part(Path(path))
    try:
        masks: dict[str, Any] = part.header["masks"]
        name = mask or next(iter(masks))
        if name not in masks or (mask is None and len(masks) > 1):
            raise MaskFileError(f"{path} holds the masks {sorted(masks)}; name one")
        bits = _read_bits(masks, name, parameter, part, max_weights)
    except _MISTAKES as error:
        if isinstance(error, MaskFileError):
            raise
        raise MaskFileError(f"{path} has an inconsistent header or section: {error}") from error
    if bits is None:
        names = [entry["name"] for entry in masks[name]["parameters"]]
        raise MaskFileError(f"{path}: mask {name!r} has no parameter {parameter!r}; it has {names[:5]} ...")
    return bits


def _read_bits(
    masks: Mapping[str, Any], name: str, parameter: str, part: Container, max_weights: int, depth: int = 0
) -> Tensor | None:
    if depth > len(masks):
        raise ValueError("masks are stored against each other in a circle")
    for entry in masks[name]["parameters"]:
        if entry["name"] == parameter:
            _check_size(_count(entry["shape"]), max_weights)
            base = None
            if entry.get("context") is not None:
                base = _read_bits(masks, masks[name]["against"], parameter, part, max_weights, depth + 1)
            return _parse_bits(entry, part, base)
    return None


# ---- header and sections


def _describe_mask(
    mask: Mask, sections: Sections, masks: Mapping[str, Mask], codec_name: str
) -> dict[str, Any]:
    parameters = []
    base = {} if mask.against is None else masks[mask.against].bits
    for name, bits in mask.bits.items():
        coded, context = codec.encode(bits.numpy(), codec_name), None
        if name in base and codec_name == codec.DEFAULT:
            by_base = codec.encode(bits.numpy(), codec_name, classes=base[name].numpy().view(np.uint8))
            if len(by_base) < len(coded):
                coded, context = by_base, "against"
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


def _parse_mask(described: Mapping[str, Any], whole: Container, masks: Mapping[str, Mask]) -> Mask:
    if described["kind"] != "threshold" or described["scale"] not in ("sqrt", "none"):
        raise ValueError(f"unknown mask kind {described['kind']!r} with scale {described['scale']!r}")
    bits, num_segments = {}, {}
    for entry in described["parameters"]:
        name = entry["name"]
        base = masks[described["against"]].bits[name] if entry.get("context") is not None else None
        bits[name] = _parse_bits(entry, whole, base)
        if len(entry["kept"]) > 1:
            num_segments[name] = len(entry["kept"])
    return Mask(
        bits=bits,
        weights_fingerprint=described["weights_fingerprint"],
        scaled=described["scale"] == "sqrt",
        num_segments=num_segments,
        statistics={entry["name"]: _parse_array(entry, whole) for entry in described["statistics"]},
        threshold=described["threshold"],
        against=described.get("against"),
    )


def _parse_bits(entry: Mapping[str, Any], whole: Container, base: Tensor | None) -> Tensor:
    name, shape, kept = entry["name"], entry["shape"], entry["kept"]
    if entry.get("context") not in (None, "against"):
        raise ValueError(f"{name}: unknown context {entry['context']!r}")
    if base is not None and list(base.shape) != shape:
        raise ValueError(f"{name}: shape {shape} differs from that of the mask it is stored against")
    classes = None if base is None else base.numpy().view(np.uint8)
    array = codec.decode(whole.section(entry["section"]), _count(shape), entry["codec"], classes=classes)
    bits = torch.from_numpy(array.reshape(shape))
    if not kept or [int(piece.sum()) for piece in bits.chunk(len(kept))] != kept:
        raise ValueError(f"{name}: the count of kept weights differs from the header's")
    return bits


def _describe_array(name: str, tensor: Tensor, sections: Sections) -> dict[str, Any]:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in _ARRAY_DTYPES:
        raise MaskFileError(
            f"statistic {name} has dtype {dtype}; a mask file holds {', '.join(_ARRAY_DTYPES)}"
        )
    data = tensor.contiguous().numpy().astype(_ARRAY_DTYPES[dtype]).tobytes()
    return {"name": name, "shape": list(tensor.shape), "dtype": dtype, "section": sections.add(data)}


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
        raise ValueError(
            f"it holds {count:,} values, more than the limit of {most:,}; max_weights= raises it"
        )
