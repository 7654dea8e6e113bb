"""The mask file: one or more masks of one backbone, written and read without executing anything.

    bytes 0-7    magic b"SELFMASK"
    8-11         format version, little-endian uint32
    12-19        length H of the header, little-endian uint64
    20-20+H      header, UTF-8 JSON: backbone, masks, sections (offset, length), preprocessing, metrics
    ...          sections: coded mask bits, and moved statistics as little-endian arrays
    last 32      sha256 of everything before

A reader checks the digest before it believes a byte, and sizes before it allocates. `docs/mask_format.md` is
the specification. Knows nothing of optimizers or process groups.
"""

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from selfmask_dist import codec
from selfmask_dist.backbones import fingerprint
from selfmask_dist.masking import Masks, core

MAGIC = b"SELFMASK"
VERSION = 1
_PREFIX = struct.Struct("<8sIQ")
_DIGEST_BYTES = 32
_MAX_HEADER_BYTES = 64 * 2**20
_STATISTICS_DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(name).newbyteorder("<")
    for name in ("float16", "float32", "float64", "int64", "uint8", "bool")
}


class MaskFileError(ValueError):
    """A mask file that cannot be read, or does not fit the model at hand."""


@dataclass(frozen=True)
class Mask:
    """One mask: bits per parameter and what is needed to turn them into theta again."""

    bits: dict[str, Tensor]  # bool, the parameter's shape
    weights_fingerprint: str  # of the frozen weights under the mask
    scaled: bool = True  # theta = a W M, or W M
    num_segments: dict[str, int] = field(default_factory=dict)  # parameters with more than one scale
    statistics: dict[str, Tensor] = field(
        default_factory=dict
    )  # moved running statistics of normalisation layers
    threshold: float = 0.0
    against: str | None = None  # an earlier mask of the file whose bits are flipped where that is smaller

    def num_weights(self) -> int:
        return sum(bits.numel() for bits in self.bits.values())


@dataclass(frozen=True)
class MaskFile:
    """The contents of a mask file: `masks` by name, and where they come from."""

    masks: dict[str, Mask]
    backbone: str = ""
    backbone_fingerprint: str = ""
    preprocessing: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)  # of a cascade: its router and combinations


def from_masks(masks: Masks) -> Mask:
    """The file's view of masks in training."""
    return Mask(
        bits={name: bits.cpu() for name, bits in masks.masks().items()},
        weights_fingerprint=fingerprint(masks.weights().items()),
        scaled=masks.scale != "none",
        num_segments={entry.name: entry.num_segments for entry in masks.entries if entry.num_segments > 1},
        statistics={name: statistic.cpu() for name, statistic in masks.moved_statistics().items()},
        threshold=masks.threshold,
    )


def write_mask_file(path: str | Path, file: MaskFile) -> int:
    """Write `file` to `path` by way of a temporary name and one rename; returns the number of bytes.

    Raises:
        MaskFileError: a statistic has a dtype the format does not hold.
    """
    sections: list[bytes] = []
    header = {
        "backbone": {"name": file.backbone, "fingerprint": file.backbone_fingerprint},
        "preprocessing": file.preprocessing,
        "metrics": file.metrics,
        "masks": {name: _describe_mask(mask, sections, file.masks) for name, mask in file.masks.items()},
        "order": list(file.masks),
        "tensors": [_describe_array(name, tensor, sections) for name, tensor in file.tensors.items()],
    }
    header_bytes = json.dumps(header, sort_keys=True, allow_nan=False).encode()
    body = b"".join([_PREFIX.pack(MAGIC, VERSION, len(header_bytes)), header_bytes, *sections])
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as stream:
            stream.write(body + hashlib.sha256(body).digest())
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return len(body) + _DIGEST_BYTES


def read_mask_file(path: str | Path) -> MaskFile:
    """Read and verify a mask file.

    Raises:
        MaskFileError: not a mask file, a newer version, or damaged in any byte.
        FileNotFoundError: no such file.
    """
    data = Path(path).read_bytes()
    if len(data) < _PREFIX.size + _DIGEST_BYTES or data[:8] != MAGIC:
        raise MaskFileError(f"{path} is not a mask file (it does not begin with {MAGIC.decode()})")
    _, version, header_length = _PREFIX.unpack_from(data)
    if hashlib.sha256(data[:-_DIGEST_BYTES]).digest() != data[-_DIGEST_BYTES:]:
        raise MaskFileError(
            f"{path} is damaged or cut short: its checksum does not match; copy it again from its source"
        )
    if version != VERSION:
        raise MaskFileError(
            f"{path} has format version {version}, this selfmask_dist reads {VERSION}; upgrade selfmask_dist"
        )
    body = memoryview(data)[_PREFIX.size : -_DIGEST_BYTES]
    if header_length > min(len(body), _MAX_HEADER_BYTES):
        raise MaskFileError(
            f"{path} states a header of {header_length} bytes, more than the file or the limit allows"
        )
    try:
        header = json.loads(bytes(body[:header_length]))
        sections = body[header_length:]
        masks: dict[str, Mask] = {}
        for name in header.get("order", header["masks"]):
            masks[name] = _parse_mask(header["masks"][name], sections, masks)
        return MaskFile(
            masks=masks,
            tensors={entry["name"]: _parse_array(entry, sections) for entry in header.get("tensors", ())},
            backbone=header["backbone"]["name"],
            backbone_fingerprint=header["backbone"]["fingerprint"],
            preprocessing=header["preprocessing"],
            metrics=header["metrics"],
        )
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise MaskFileError(f"{path} has an inconsistent header or section: {error}") from error


@torch.no_grad()
def apply_mask(model: nn.Module, mask: Mask) -> None:
    """Write theta = a * W * M and the moved statistics into `model`, which holds the frozen weights W.

    The model may be the encoder itself or hold it under a prefix (`visual.` of a whole open_clip model,
    `module.`); other parameters, such as a head, are left alone.

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


def materialize(mask: Mask, name: str, weight: Tensor) -> Tensor:
    """Theta = a * W * M of one parameter, in a new tensor."""
    num_segments, bits = mask.num_segments.get(name, 1), mask.bits[name].to(weight.device)
    pieces = zip(weight.chunk(num_segments), bits.chunk(num_segments), strict=True)
    return torch.cat([core.materialize(piece, bits, scaled=mask.scaled) for piece, bits in pieces])


def check_fits(model: nn.Module, mask: Mask) -> dict[str, Tensor]:
    """The tensors of `model` that a mask writes, by the mask's names; errors as in `apply_mask`."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    prefix = _find_prefix(mask.bits, tensors)
    for name, bits in mask.bits.items():
        if tensors[prefix + name].shape != bits.shape:
            raise MaskFileError(
                f"{name} has shape {tuple(tensors[prefix + name].shape)} in the model and "
                f"{tuple(bits.shape)} in the mask; "
                f"build the backbone as it was when the mask was trained"
            )
    found = fingerprint((name, tensors[prefix + name]) for name in mask.bits)
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
    """What a mask file holds, as text for a person; verifies it on the way."""
    file = read_mask_file(path)
    lines = [
        f"{path}: {Path(path).stat().st_size:,} bytes",
        f"backbone {file.backbone or 'not stated'}, fingerprint "
        f"{file.backbone_fingerprint[:12] or 'not stated'}",
        *(f"{name} {value:.4f}" for name, value in file.metrics.items()),
    ]
    for name, mask in file.masks.items():
        kept = sum(int(bits.sum()) for bits in mask.bits.values())
        lines.append(f"\nmask {name!r}: {mask.num_weights():,} weights, {kept / mask.num_weights():.2%} kept")
        for parameter, bits in mask.bits.items():
            shape = "x".join(map(str, bits.shape))
            lines.append(f"  {parameter:40s} {shape:>14s}  {float(bits.double().mean()):7.2%} kept")
        if mask.statistics:
            lines.append(f"  and {len(mask.statistics)} moved statistics")
    return "\n".join(lines)


# ---- header and sections


def _describe_mask(mask: Mask, sections: list[bytes], masks: Mapping[str, Mask]) -> dict[str, Any]:
    parameters = []
    base = {} if mask.against is None else masks[mask.against].bits
    for name, bits in mask.bits.items():
        array = bits.numpy()
        coded, is_flipped = codec.encode(array), False
        if name in base:
            flips = codec.encode((bits ^ base[name]).numpy())
            coded, is_flipped = min((coded, False), (flips, True), key=lambda pair: len(pair[0]))
        kept = [int(piece.sum()) for piece in bits.chunk(mask.num_segments.get(name, 1))]
        parameters.append(
            {
                "name": name,
                "shape": list(array.shape),
                "kept": kept,  # per scaled segment: a = sqrt(N / kept)
                "codec": codec.DEFAULT,
                "section": _append(sections, coded),
                **({"flips": True} if is_flipped else {}),
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


def _parse_mask(described: Mapping[str, Any], sections: memoryview, masks: Mapping[str, Mask]) -> Mask:
    if described["kind"] != "threshold" or described["scale"] not in ("sqrt", "none"):
        raise ValueError(f"unknown mask kind {described['kind']!r} with scale {described['scale']!r}")
    bits, num_segments = {}, {}
    for parameter in described["parameters"]:
        name, shape, kept = parameter["name"], _shape(parameter["shape"]), parameter["kept"]
        data = _slice(sections, parameter["section"])
        array = codec.decode(data, int(np.prod(shape, dtype=np.int64)), parameter["codec"]).reshape(shape)
        bits[name] = torch.from_numpy(array)
        if parameter.get("flips", False):
            bits[name] = bits[name] ^ masks[described["against"]].bits[name]
        if [int(piece.sum()) for piece in bits[name].chunk(len(kept))] != kept:
            raise ValueError(f"{name}: the count of kept weights differs from the header's")
        if len(kept) > 1:
            num_segments[name] = len(kept)
    return Mask(
        bits=bits,
        weights_fingerprint=described["weights_fingerprint"],
        scaled=described["scale"] == "sqrt",
        num_segments=num_segments,
        statistics={entry["name"]: _parse_array(entry, sections) for entry in described["statistics"]},
        threshold=described["threshold"],
        against=described.get("against"),
    )


def _describe_array(name: str, tensor: Tensor, sections: list[bytes]) -> dict[str, Any]:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in _STATISTICS_DTYPES:
        raise MaskFileError(
            f"statistic {name} has dtype {dtype}; a mask file holds {', '.join(_STATISTICS_DTYPES)}"
        )
    data = tensor.contiguous().numpy().astype(_STATISTICS_DTYPES[dtype]).tobytes()
    return {"name": name, "shape": list(tensor.shape), "dtype": dtype, "section": _append(sections, data)}


def _parse_array(entry: Mapping[str, Any], sections: memoryview) -> Tensor:
    array = np.frombuffer(_slice(sections, entry["section"]), _STATISTICS_DTYPES[entry["dtype"]])
    return torch.from_numpy(array.reshape(_shape(entry["shape"])).copy())


def _append(sections: list[bytes], data: bytes) -> list[int]:
    offset = sum(map(len, sections))
    sections.append(data)
    return [offset, len(data)]


def _slice(sections: memoryview, section: list[int]) -> bytes:
    offset, length = section
    if not 0 <= offset <= offset + length <= len(sections):
        raise ValueError(f"section [{offset}, {length}] lies outside the file")
    return bytes(sections[offset : offset + length])


def _shape(value: list[int]) -> tuple[int, ...]:
    if not all(isinstance(n, int) and n >= 0 for n in value):
        raise ValueError(f"bad shape {value}")
    return tuple(value)


def _find_prefix(names: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> str:
    """The one prefix under which the model holds every masked parameter."""
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
