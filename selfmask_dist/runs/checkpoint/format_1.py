"""Checkpoints of before 2026-11-30: whole tensors that one process wrote with torch.distributed.checkpoint.

Delete this file when no run of then is to go on; `OpenCheckpoint` is what takes its place.
"""

import warnings

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from selfmask_dist.parallel.parts import TensorPart
from selfmask_dist.runs.checkpoint.folder import CheckpointError
from selfmask_dist.runs.checkpoint.reading import OpenCheckpoint


class OpenFormat1(OpenCheckpoint):
    """As `OpenCheckpoint`; a tensor of which a part is asked for is read whole, one at a time."""

    def _open(self) -> None:
        entries = dcp.FileSystemReader(self.path).read_metadata().state_dict_metadata
        tensors = {name: one for name, one in entries.items() if isinstance(one, TensorStorageMetadata)}
        self.dtypes = {name: one.properties.dtype for name, one in tensors.items()}
        self.shapes = {name: one.size for name, one in tensors.items()}

    def read_into(self, part: TensorPart) -> None:
        tensor = torch.empty(self.shapes[part.name], dtype=self.dtypes[part.name])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it warns of having no process group, which is the intent
                reader = dcp.FileSystemReader(self.path)
                dcp.load({part.name: tensor}, storage_reader=reader, no_dist=True)
        except Exception as error:
            raise CheckpointError(f"{part.name} of {self.path} cannot be read: {error}") from error
        self.bytes_read += tensor.nbytes
        part.fill(0, tensor.reshape(-1))
