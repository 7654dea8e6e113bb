"""Reading a checkpoint: of each tensor the elements that are asked for, from whichever files have them."""

import json
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfmask_dist.parallel.parts import TensorPart
from selfmask_dist.runs.checkpoint.folder import TENSORS, VALUES, CheckpointError
from selfmask_dist.runs.checkpoint.watching import ReadingWatch


@dataclass(frozen=True)
class Checkpoint:
    """What one holds: tensors by name, whole and on the CPU, and a dict that JSON can hold."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]


class OpenCheckpoint:
    """A committed checkpoint of which no tensor is held; a `StateSource` of an engine.

    values: what is no tensor. shapes: of whole tensors, by name. bytes_read: of tensors, so far.

    Args:
        watch: verifies what is read; `confirm` must be called before it is used. None: all is verified.

    Raises:
        CheckpointError: files cannot be read.
    """

    def __init__(self, path: Path, watch: ReadingWatch | None = None) -> None:
        self.path = path
        self.bytes_read = 0
        self._watch = watch
        try:
            self.values: dict[str, Any] = json.loads((path / VALUES).read_text())
            self._open()
        except Exception as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error

    def _open(self) -> None:
        places = json.loads((self.path / TENSORS).read_text())
        self._files: list[str] = places["files"]
        self._pieces = {name: one["pieces"] for name, one in places["tensors"].items()}
        self.dtypes = {name: getattr(torch, one["dtype"]) for name, one in places["tensors"].items()}
        self.shapes = {name: torch.Size(one["shape"]) for name, one in places["tensors"].items()}

    def confirm(self) -> None:
        """Say that what is needed was read, and hear whether all of the checkpoint is as it was written.

        Nothing is to do where it was verified when it was opened. Collective: every rank must call.

        Raises:
            DamagedCheckpointError: it is not, on any rank: what was loaded must not be used.
        """
        if self._watch is not None:
            self._watch.confirm()
            self._watch = None

    def read_into(self, part: TensorPart) -> None:
        """Fill a part with the tensor's elements.

        Raises:
            CheckpointError: the file cannot be read, or the tensor is of another shape.
        """
        if self.shapes[part.name] != part.shape:
            raise CheckpointError(
                f"{part.name} has shape {tuple(self.shapes[part.name])} in {self.path} and "
                f"{tuple(part.shape)} here"
            )
        pieces, dtype = self._pieces[part.name], self.dtypes[part.name]
        # pieces lie one behind the other: begin with the last one that starts before this part or with it
        index = max(bisect_right(pieces, part.start, key=lambda piece: piece[0]) - 1, 0)
        for start, length, file, offset in pieces[index:]:
            low, high = max(start, part.start), min(start + length, part.stop)
            if start >= part.stop:
                break
            if low < high:
                place = offset + (low - start) * dtype.itemsize
                part.fill(low, self._read(self._files[file], place, high - low, dtype))

    def _read(self, file: str, place: int, num: int, dtype: torch.dtype) -> Tensor:
        values = torch.empty(num, dtype=dtype)
        view = values.view(torch.uint8).numpy().data
        try:
            self._read_bytes(file, place, view)
        except CheckpointError as error:
            if self._watch is None:
                raise
            # the other ranks go on loading, which they do together: `confirm` tells all
            self._watch.failed(file, str(error).removeprefix(f"{self.path / file} "))
            return values.zero_()
        if self._watch is not None:
            self._watch.saw(file, place, view)
        return values

    def _read_bytes(self, file: str, place: int, view: memoryview) -> None:
        done = 0
        try:
            with open(self.path / file, "rb", buffering=0) as stream:
                stream.seek(place)
                while done < len(view) and (count := stream.readinto(view[done:])):
                    done += count
        except OSError as error:
            raise CheckpointError(f"{self.path / file} cannot be read ({error.strerror})") from error
        if done < len(view):
            raise CheckpointError(f"{self.path / file} ended early while it was read")
        self.bytes_read += done

    def whole(self) -> Checkpoint:
        """Return everything that is in it."""
        return Checkpoint({name: self.read(name) for name in self.shapes}, self.values)

    def read(self, name: str) -> Tensor:
        """Return a whole tensor."""
        tensor = torch.empty(self.shapes[name], dtype=self.dtypes[name])
        self.read_into(TensorPart(name, tensor.shape, tensor))
        return tensor
