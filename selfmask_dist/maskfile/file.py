"""Masks to a file and back: what header and sections of a mask file mean.

`docs/mask_format.md` is the specification. A reader believes no number before it is checked, and allocates
nothing that a limit does not allow.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from selfmask_dist.maskfile import codec, container, forms
from selfmask_dist.maskfile.container import Container, Sections
from selfmask_dist.maskfile.mask import Mask, MaskFile, MaskFileError, WithoutWeightsError
from selfmask_dist.maskfile.model import coding
from selfmask_dist.maskfile.reading import Reading, Weights, classes

# of one parameter; and of all masks of a file together, a byte each while they are read, however small it is
MAX_WEIGHTS = 4 * 10**9
WEIGHTS_PER_BYTE = 4096  # of its sections, where that is more: memory is at most a multiple of the file
_MAX_VERDICT = 500  # characters

_MISTAKES = (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError)


def write_mask_file(
    path: str | Path,
    file: MaskFile,
    *,
    codec_name: str = codec.DEFAULT,
    weights: Weights | None = None,
    parts: Mapping[str, Iterable[Mask]] | None = None,
) -> int:
    """Write `file` to `path` by way of a temporary name and one rename; returns the number of bytes.

    Args:
        codec_name: `entropy`, the smallest, or `packbits-zstd`, which everyday tools can read.
        weights: the frozen weights. With them the file is smaller, as large weights are pruned more often,
            and cannot be read without them.
        parts: by a mask's name, its parameters in masks of their own, which are coded and let go one after
            the other; the mask in `file` then has all but them. Those of a mask that others are stored
            against are gone through again for each, and all have their parameters in one order.

    Raises:
        MaskFileError: a statistic has a dtype the format does not hold, or a mask is to be coded against
            something that its kind leaves no use for.
    """
    _check_metrics(file.metrics)
    sections = Sections()
    header = {
        "backbone": {"name": file.backbone, "fingerprint": file.backbone_fingerprint},
        "preprocessing": file.preprocessing,
        "metrics": file.metrics,
        **({"verdict": file.verdict} if file.verdict else {}),
        "masks": {
            name: _describe_mask(
                mask,
                (parts or {}).get(name, [mask]),
                sections,
                {} if mask.against is None else _bits_of(mask.against, file.masks, parts or {}),
                codec_name,
                weights,
            )
            for name, mask in file.masks.items()
        },
        "order": list(file.masks),
        "tensors": [
            container.describe_array(name, tensor, sections) for name, tensor in file.tensors.items()
        ],
    }
    _keep_to_limit(header, sections)
    if file.models:
        header[coding.KEY] = coding.describe(file.models, sections)
    has_forms = any(mask.kind != "threshold" or mask.blocks for mask in file.masks.values())
    version = container.VERSION_WITH_FORMS if has_forms else container.VERSION
    return container.write(Path(path), header, sections, version=version)


def add_numbers(path: str | Path, *, metrics: Mapping[str, float], verdict: str = "") -> int:
    """Write a mask file anew with other metrics and another verdict; return its bytes.

    Everything else stays, and the file is the one that `write_mask_file` would have written with them. It is
    replaced in one rename: a process that ends in the middle leaves it as it was.

    Raises:
        MaskFileError: as in `read_mask_file`; or a metric is not finite.
    """
    _check_metrics(metrics)
    said = {"metrics": dict(metrics), **({"verdict": verdict} if verdict else {})}

    def change(header: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in header.items() if key != "verdict"} | said

    return container.rewrite_header(Path(path), change)


def _check_metrics(metrics: Mapping[str, float]) -> None:
    if bad := {name: value for name, value in metrics.items() if not math.isfinite(value)}:
        raise MaskFileError(f"metrics that are not finite numbers are not stored: {bad}; leave them out")


def read_mask_file(
    path: str | Path, *, weights: Weights | None = None, max_weights: int | None = None
) -> MaskFile:
    """Read and verify a mask file.

    Args:
        weights: the frozen weights, for a file written with them; `weights_of` finds them in a model.
        max_weights: a file that states more than this is refused before anything is allocated. None:
            `MAX_WEIGHTS`, or `WEIGHTS_PER_BYTE` for each byte of its sections where that is more.

    Raises:
        MaskFileError: not a mask file, another version, damaged in any byte, too large, or without the
            weights that it takes.
        FileNotFoundError: no such file.
    """
    whole = container.read(Path(path))
    try:
        reading = Reading(whole, weights)
        container.check_size(_count_values(whole.header), max_weights or _limit(whole.num_bytes))
        return _contents(whole, {name: reading.mask(name) for name in reading.order}, with_tensors=True)
    except _MISTAKES as error:
        raise _refusal(path, error) from error


def read_about(path: str | Path, *, with_tensors: bool = False) -> MaskFile:
    """Return what a mask file says beside its masks, which are left out: backbone, metrics, models.

    The header and the models' arrays are read, each with its checksum.

    Args:
        with_tensors: read a cascade's router and combinations as well.

    Raises:
        MaskFileError: as in `read_mask_file`, for these.
    """
    try:
        whole = container.open_part(Path(path))
        container.check_size(_count_values(whole.header), _limit(whole.num_bytes))
        return _contents(whole, {}, with_tensors=with_tensors)
    except _MISTAKES as error:
        raise _refusal(path, error) from error


def _contents(whole: Container, masks: dict[str, Mask], *, with_tensors: bool) -> MaskFile:
    header = whole.header
    tensors = header["tensors"] if with_tensors else ()
    return MaskFile(
        masks=masks,
        tensors={entry["name"]: container.parse_array(entry, whole) for entry in tensors},
        backbone=header["backbone"]["name"],
        backbone_fingerprint=header["backbone"]["fingerprint"],
        preprocessing=header["preprocessing"],
        metrics=header["metrics"],
        verdict=_one_line(str(header.get("verdict", ""))),
        models=coding.parse(whole),
    )


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


def verify_mask_file(path: str | Path, *, max_weights: int | None = None) -> str:
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


def _limit(num_bytes: int) -> int:
    """Return how many values a file may state whose sections take so many bytes."""
    return max(MAX_WEIGHTS, WEIGHTS_PER_BYTE * num_bytes)


def _count_values(header: Mapping[str, Any]) -> int:
    """Return how many values a file states: about as many bytes are taken while it is read.

    Raises:
        MaskFileError: a single array states more than `MAX_WEIGHTS`.
        ValueError: a shape is none.
    """
    entries = [
        entry for mask in header["masks"].values() for entry in (*mask["parameters"], *mask["statistics"])
    ]
    signed = [entry for entry in entries if "signs" in entry]
    arrays = [*entries, *signed, *header["tensors"], *coding.entries(header)]
    counts = [container.count_values(entry["shape"]) for entry in arrays]
    if max(counts, default=0) > MAX_WEIGHTS:
        raise MaskFileError(
            f"one of its arrays holds {max(counts):,} values, more than the limit of {MAX_WEIGHTS:,} for one"
        )
    return sum(counts)


def _keep_to_limit(header: Mapping[str, Any], sections: Sections) -> None:
    """Add zeros behind the sections where a file would state more values than a reader takes from it.

    Bits that are all alike take no bytes; a mask of billions of weights can be so after a few steps.
    """
    size = sum(map(len, sections.parts))
    if (count := _count_values(header)) > _limit(size):
        sections.add(bytes(-(-count // WEIGHTS_PER_BYTE) - size))


def _one_line(text: str) -> str:
    """Return what a terminal can be given of a stranger's text: printable, in one line of some length."""
    return "".join(c for c in " ".join(text.split()) if c.isprintable())[:_MAX_VERDICT]


def _refusal(path: str | Path, error: Exception) -> MaskFileError:
    if isinstance(error, MaskFileError):
        return error if str(path) in str(error) else type(error)(f"{path}: {error}")
    return MaskFileError(f"{path} has an inconsistent header or section: {error}")


# ---- writing


def _describe_mask(
    mask: Mask,
    parts: Iterable[Mask],
    sections: Sections,
    base: "Mapping[str, Tensor] | _BitsInTurn",
    codec_name: str,
    weights: Weights | None,
) -> dict[str, Any]:
    parameters = []
    for part in parts:
        _check_contexts(replace(part, against=mask.against), weights)
        for name in part.bits:
            known = {"mask": base.get(name), "weights": weights(name) if weights else None}
            parameters.append(_describe_parameter(part, name, sections, codec_name, known))
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


class _BitsInTurn:
    """The bits of a mask that comes in parts, asked for in the order of the parts; one part is held."""

    def __init__(self, parts: Iterable[Mask]) -> None:
        self._parts = iter(parts)
        self._bits: dict[str, Tensor] = {}

    def get(self, name: str) -> Tensor | None:
        """Return a parameter's bits; None where it does not come any more."""
        while name not in self._bits:
            part = next(self._parts, None)
            if part is None:
                return None
            self._bits = part.bits
        return self._bits[name]


def _bits_of(
    name: str, masks: Mapping[str, Mask], parts: Mapping[str, Iterable[Mask]]
) -> Mapping[str, Tensor] | _BitsInTurn:
    return _BitsInTurn(parts[name]) if name in parts else masks[name].bits


def _describe_parameter(
    mask: Mask, name: str, sections: Sections, codec_name: str, known: Mapping[str, Tensor | None]
) -> dict[str, Any]:
    """Add a parameter's bits, and what a kind has beside them, to the sections; return its entry.

    Args:
        known: tensors by which the bits may be coded, by the context's name.
    """
    bits, block = mask.bits[name], mask.blocks.get(name)
    stored = bits if block is None else forms.to_grid(bits, block, name)
    coded, context = codec.encode(stored.numpy(), codec_name), None
    for kind, tensor in known.items():
        if tensor is not None and codec_name == codec.DEFAULT:
            smaller = codec.encode(bits.numpy(), classes=classes(kind, tensor))
            coded, context = min((coded, context), (smaller, kind), key=lambda pair: len(pair[0]))
    return {
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
    if mask.kind not in forms.KEEPS_ALL and not mask.blocks:
        return
    what = "every weight is kept" if mask.kind in forms.KEEPS_ALL else "a bit belongs to a block of weights"
    if mask.against is not None:
        raise MaskFileError(
            f"{what}, so it cannot be coded against mask {mask.against!r}; store it by itself"
        )
    if weights is not None:
        raise MaskFileError(f"{what}, which the weights tell nothing about; store it without them")
