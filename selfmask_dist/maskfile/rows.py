"""Masks on a model of which this process holds rows: theta = a * W * M is written over W.

    sharded.restore()                                    # rows of the frozen weights again
    put_file("expert-0/final.mask", sharded, fingerprint=spec.fingerprint)

A mask's file is decoded one parameter at a time, so that no process holds the bits of a whole mask, and there
is no frozen copy beside theta: whoever holds the rows brings the frozen ones back before another mask is put
on. Values are those of `apply_mask`, to the bit.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from selfmask_dist.common.fingerprint import digest
from selfmask_dist.maskfile import container
from selfmask_dist.maskfile.file import _MISTAKES, _one_line, _refusal
from selfmask_dist.maskfile.fit import warn_of_verdict
from selfmask_dist.maskfile.forms import materialize
from selfmask_dist.maskfile.mask import Mask, MaskFile, MaskFileError
from selfmask_dist.maskfile.reading import Reading, Weights
from selfmask_dist.masking import core


class WeightRows(Protocol):
    """A model that is cut into rows over processes; `parallel.fsdp.ShardedEncoder` is one."""

    def shape(self, name: str) -> torch.Size | None:
        """Return the shape of the whole parameter; None where there is none of that name."""
        ...

    def rows(self, name: str) -> tuple[Tensor, int]:
        """Return this process's rows of a parameter, to be written to, and which is the first of them."""
        ...

    def whole(self, name: str) -> Tensor:
        """Return the whole parameter. Collective: every rank must call."""
        ...

    def buffer(self, name: str) -> Tensor | None:
        """Return a buffer, which every process holds whole; None where there is none of that name."""
        ...


def put_file(path: str | Path, weights: WeightRows, *, fingerprint: str) -> None:
    """Put the mask of a file that holds one on a sharded model. Collective: every rank must call.

    Args:
        weights: hold the frozen weights.
        fingerprint: of the backbone. Where the file states the same, its weights are not looked at; otherwise
            those under the mask are gathered one by one and compared.

    Raises:
        MaskFileError: the file is damaged, holds several masks, or does not fit the model or its weights.
    """
    header = container.open_part(Path(path)).header
    warn_of_verdict(MaskFile({}, verdict=_one_line(str(header.get("verdict", "")))), path)
    parts = read_by_parameter(path, weights=weights.whole)
    first = next(parts)
    if header["backbone"]["fingerprint"] != fingerprint:
        names = [entry["name"] for entry in next(iter(header["masks"].values()))["parameters"]]
        check_weights(names, first.weights_fingerprint, weights)
    put([first], weights)
    put(parts, weights)


@dataclass(frozen=True)
class StoredMask:
    """A mask that stays in its file. To go through it yields masks of one parameter each, decoded anew.

    parameters: their names, in order. blocks: rows and columns that share a bit, where there are blocks.
    """

    path: Path
    name: str
    weights_fingerprint: str
    parameters: tuple[str, ...]
    blocks: Mapping[str, tuple[int, int]]

    def __iter__(self) -> Iterator[Mask]:
        return read_by_parameter(self.path, name=self.name)

    def put_on(self, weights: WeightRows, *, is_checked: bool) -> None:
        """Put it on a sharded model that holds the frozen weights. Collective: every rank must call.

        Args:
            is_checked: the weights are known to be those it was made for.

        Raises:
            MaskFileError: as in `put_file`.
        """
        if not is_checked:
            check_weights(self.parameters, self.weights_fingerprint, weights)
        put(read_by_parameter(self.path, name=self.name, weights=weights.whole), weights)

    def without_bits(self) -> Mask:
        """Return all of the mask but its parameters, as `write_mask_file` takes it beside parts."""
        first = next(iter(self))
        return replace(
            first,
            against=None,
            bits={},
            num_segments={},
            signs={},
            scales={},
            values={},
            blocks=dict(self.blocks),
        )


def stored_masks(path: str | Path) -> dict[str, StoredMask]:
    """Return the masks of a file by name, a base before those that are stored against it.

    Only the header is read.

    Raises:
        MaskFileError: as in `read_mask_file`, for the header.
    """
    try:
        whole = container.open_part(Path(path))
        header, reading = whole.header, Reading(whole, None)
        return {
            name: StoredMask(
                Path(path),
                name,
                str(header["masks"][name]["weights_fingerprint"]),
                tuple(reading.parameters(name)),
                {key: tuple(e["block"]) for key, e in reading.parameters(name).items() if "block" in e},
            )
            for name in reading.order
        }
    except _MISTAKES as error:
        raise _refusal(path, error) from error


def read_by_parameter(
    path: str | Path, *, name: str | None = None, weights: Weights | None = None
) -> Iterator[Mask]:
    """Yield a mask of a file as masks of one parameter each; the first has the statistics.

    Sections are verified as they are read, each by its own checksum.

    Args:
        name: of the mask; None: the only one that the file holds.
        weights: the frozen weights, for a file written with them.

    Raises:
        MaskFileError: as in `read_mask_file`; or the file holds several masks, or none of that name.
    """
    try:
        reading = Reading(container.open_part(Path(path)), weights)
        if name is None and len(reading.order) != 1:
            raise MaskFileError(f"it holds the masks {sorted(reading.order)}, not one")
        name = reading.order[0] if name is None else name
        if name not in reading.order:
            raise MaskFileError(f"it holds no mask {name!r}; it has {sorted(reading.order)}")
        for parameter in reading.parameters(name):
            yield reading.mask(name, parameter)
            reading.forget()
    except _MISTAKES as error:
        raise _refusal(path, error) from error


def check_weights(names: Iterable[str], expected: str, weights: WeightRows) -> None:
    """Check that the weights under a mask are those it was made for. Collective: every rank must call.

    Raises:
        MaskFileError: they are not, or one is not there.
    """
    ordered = sorted(names)
    for name in ordered:
        _check_shape(name, None, weights)
    found = digest((name, weights.whole(name)) for name in ordered)
    if found != expected:
        raise MaskFileError(
            f"wrong backbone: the model's weights under the mask have fingerprint {found[:12]}, the mask was "
            f"trained on {expected[:12]}; load the same pretrained weights, with no mask applied yet"
        )


@torch.no_grad()
def put(masks: Iterable[Mask], weights: WeightRows) -> None:
    """Write theta of masks of different parameters, and their statistics, over the frozen weights.

    Collective, for kinds other than threshold: every rank must call.

    Raises:
        MaskFileError: a parameter is not there or has another shape.
    """
    for mask in masks:
        for name, bits in mask.bits.items():
            _check_shape(name, bits.shape, weights)
            rows, first = weights.rows(name)
            if mask.kind == "threshold":
                _write_rows(rows, first, bits, mask.num_segments.get(name, 1), is_scaled=mask.scaled)
            else:
                theta = materialize(mask, name, weights.whole(name))
                rows.copy_(theta[first : first + len(rows)])
        for name, statistic in mask.statistics.items():
            buffer = weights.buffer(name)
            if buffer is None and weights.shape(name) == statistic.shape:  # of a delta: a bias, a gain
                rows, first = weights.rows(name)
                rows.copy_(statistic[first : first + len(rows)])
                continue
            if buffer is None:
                raise MaskFileError(f"the mask brings running statistics the model does not have: {name}")
            buffer.copy_(statistic)


def _write_rows(rows: Tensor, first: int, bits: Tensor, num_segments: int, *, is_scaled: bool) -> None:
    """Turn rows of W into rows of theta; a segment's scale is of all its bits, whoever holds them."""
    own = bits[first : first + len(rows)].to(rows.device)
    theta = own.to(rows.dtype).mul_(rows)
    start = 0
    for segment in bits.chunk(num_segments) if is_scaled else ():
        scale = core.scale_factor(core.count_kept(segment), segment.numel(), rows.dtype).item()
        theta[max(start - first, 0) : max(start + len(segment) - first, 0)].mul_(scale)
        start += len(segment)
    rows.copy_(theta)


def _check_shape(name: str, shape: torch.Size | None, weights: WeightRows) -> None:
    found = weights.shape(name)
    if found is None:
        raise MaskFileError(f"the model lacks the masked parameter {name}; it is another architecture")
    if shape is not None and found != shape:
        raise MaskFileError(
            f"{name} has shape {tuple(found)} in the model and {tuple(shape)} in the mask; build the "
            f"backbone as it was when the mask was trained"
        )
