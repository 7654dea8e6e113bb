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


@dataclass(frozen=True)
class Checkpoint:
    """What one holds: tensors by name, whole and on the CPU, and a dict that JSON can hold."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]


class OpenCheckpoint:
    """A committed checkpoint of which no tensor is held; a `StateSource` of an engine.

    values: what is no tensor. shapes: of whole tensors, by name. bytes_read: of tensors, so far.

    Raises:
        CheckpointError: files cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes_read = 0
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
        view, done = values.view(torch.uint8).numpy().data, 0
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
        return values

    def whole(self) -> Checkpoint:
        """Return everything that is in it."""
        return Checkpoint({name: self.read(name) for name in self.shapes}, self.values)

    def read(self, name: str) -> Tensor:
        """Return a whole tensor."""
        tensor = torch.empty(self.shapes[name], dtype=self.dtypes[name])
        self.read_into(TensorPart(name, tensor.shape, tensor))
        return tensor
