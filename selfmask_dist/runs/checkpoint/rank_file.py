"""The file of one process in a checkpoint: what it held of each tensor, flat, as safetensors.

    Staging.fill(parts)   the elements that this process is to write, copied into one buffer of the CPU
    write_file(path)      header and buffer to the disk, hashed on the way, block by block

An element that several processes hold is written by one of them, and tensors that all hold are dealt out so
that all write about as much. Any program reads the files; where an element of a tensor lies is also said by
`tensors.json`, so that a reader fetches the bytes that it needs and no others.
"""

import hashlib
import heapq
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from selfmask_dist.parallel.parts import TensorPart

BLOCK = 2**22  # bytes that have one checksum, so that many processes verify a file together
_SPLIT = 2**18  # bytes of what several processes hold that are worth a piece of their own

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Piece:
    """Elements start ... start + length of a flattened tensor, and the byte where they begin."""

    name: str
    start: int
    length: int
    offset: int


@dataclass(frozen=True)
class Staged:
    """What one process is to write of a state, and what tensors the state has in all.

    data: bytes (n,) on the CPU. pieces: what lies in it, from byte 0 on without gaps.
    tensors: dtype and whole shape of every tensor, written here or elsewhere, by name.
    """

    data: Tensor
    pieces: list[Piece]
    tensors: dict[str, tuple[torch.dtype, torch.Size]]

    @property
    def whole_bytes(self) -> int:
        """The bytes of the state, of all processes together."""
        return sum(shape.numel() * dtype.itemsize for dtype, shape in self.tensors.values())


class Staging:
    """Copies states to the CPU, into memory that the next one reuses."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    @torch.no_grad()
    def fill(self, parts: Sequence[TensorPart]) -> Staged:
        """Copy what this process is to write; what `fill` returned before is lost by it.

        Raises:
            ValueError: a dtype that no file holds.
        """
        tensors = {part.name: (part.tensor.dtype, part.shape) for part in parts}
        if odd := sorted({str(dtype) for dtype, _ in tensors.values() if dtype not in _DTYPES}):
            raise ValueError(f"checkpoints hold no tensors of {', '.join(odd)}")
        # wide ones first: every piece then begins at a multiple of its element size, without gaps
        chosen = sorted(own_ranges(parts), key=lambda one: -one[0].tensor.dtype.itemsize)
        total = sum((high - low) * part.tensor.dtype.itemsize for part, low, high in chosen)
        on_gpu = any(part.tensor.is_cuda for part in parts)
        if self._buffer.numel() < total:
            self._buffer = torch.empty(0, dtype=torch.uint8)  # let go of first
            self._buffer = torch.empty(total, dtype=torch.uint8, pin_memory=on_gpu)
        pieces, offset = [], 0
        for part, low, high in chosen:
            dtype = part.tensor.dtype
            stop = offset + (high - low) * dtype.itemsize
            target = self._buffer[offset:stop].view(dtype)
            target.copy_(part.tensor.detach().reshape(-1)[low:high], non_blocking=True)
            pieces.append(Piece(part.name, part.start + low, high - low, offset))
            offset = stop
        if on_gpu:
            torch.cuda.synchronize()
        return Staged(self._buffer[:total], pieces, tensors)


def own_ranges(parts: Sequence[TensorPart]) -> Iterator[tuple[TensorPart, int, int]]:
    """Yield what this process writes: a part, and the first and last + 1 of its elements.

    What several processes hold is cut and dealt to the one that has least so far; each reckons the same.
    """
    loads: dict[int, list[tuple[int, int]]] = {}  # by the number of copies: (bytes, copy), a heap
    for part in parts:
        num = part.tensor.numel()
        if not num:
            continue
        if part.copies == 1 or part.is_of_first:
            if part.copy == 0:
                yield part, 0, num
            continue
        heap = loads.setdefault(part.copies, [(0, copy) for copy in range(part.copies)])
        count = min(part.copies, max(part.tensor.nbytes // _SPLIT, 1), num)
        for index in range(count):
            low, high = num * index // count, num * (index + 1) // count
            load, copy = heap[0]
            heapq.heapreplace(heap, (load + (high - low) * part.tensor.dtype.itemsize, copy))
            if copy == part.copy:
                yield part, low, high


@dataclass
class WrittenFile:
    """What the manifest is to know of a file. pieces: with the byte of the file where each begins.

    sha256, crc32: of each `BLOCK` of bytes in turn; the former says more, the latter can be combined.
    """

    name: str
    num_bytes: int = 0
    sha256: list[str] = field(default_factory=list)
    crc32: list[int] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)


def write_file(path: Path, staged: Staged) -> WrittenFile:
    """Write a process's file and force it to the disk; hash it on the way.

    Raises:
        OSError: the disk is full or cannot be written to.
    """
    header = json.dumps(
        {
            f"{piece.name}[{piece.start}:{piece.start + piece.length}]": {
                "dtype": _DTYPES[staged.tensors[piece.name][0]],
                "shape": [piece.length],
                "data_offsets": [piece.offset, _stop(piece, staged)],
            }
            for piece in staged.pieces
        }
    ).encode()
    header += b" " * (-len(header) % 8)  # data begins at a multiple of 8 bytes
    begin = 8 + len(header)
    written = WrittenFile(path.name)
    data = staged.data.numpy().data
    with open(path, "wb") as stream:
        digest, crc, filled = hashlib.sha256(), 0, 0
        for chunk in (memoryview(len(header).to_bytes(8, "little") + header), data):
            first = 0
            while first < len(chunk):
                block = chunk[first : first + BLOCK - filled]
                stream.write(block)
                digest.update(block)
                crc = zlib.crc32(block, crc)
                first, filled = first + len(block), filled + len(block)
                if filled == BLOCK:
                    written.sha256.append(digest.hexdigest())
                    written.crc32.append(crc)
                    digest, crc, filled = hashlib.sha256(), 0, 0
        if filled:
            written.sha256.append(digest.hexdigest())
            written.crc32.append(crc)
        stream.flush()
        os.fsync(stream.fileno())
        written.num_bytes = stream.tell()
    written.pieces = [Piece(p.name, p.start, p.length, begin + p.offset) for p in staged.pieces]
    return written


def _stop(piece: Piece, staged: Staged) -> int:
    return piece.offset + piece.length * staged.tensors[piece.name][0].itemsize
