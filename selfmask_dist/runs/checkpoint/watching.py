"""Verifying a checkpoint from the bytes that are read of it anyway.

    each read          the CRC-32 of the bytes, cut where blocks of the file end
    confirm()          a block that one rank read whole: by that rank
                       one that several read parts of: from their checksums, combined by one of them
                       what nobody read (headers, tensors of no use here): dealt out, read and combined

Every rank gets the same verdict. What was loaded must not be used before it.
"""

import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from selfmask_dist.runs.checkpoint.crc import combined_crc
from selfmask_dist.runs.checkpoint.folder import CheckpointError, rename_invalid
from selfmask_dist.runs.checkpoint.peers import Peers

_Block = tuple[str, int]  # a file's name and the number of the block
_Span = tuple[int, int, int]  # first byte within a block, the one behind the last, CRC-32


class DamagedCheckpointError(CheckpointError):
    """A checkpoint turned out to be damaged after it was loaded; what it was loaded into must not be used."""

    def __init__(self, path: Path, text: str) -> None:
        super().__init__(text)
        self.path = path


class ReadingWatch:
    """What this process has read of one checkpoint, and what is wrong with it.

    bytes_read: by `confirm` alone.

    Args:
        manifest: of the checkpoint, with a `crc32` of each block.
        peers: the processes that load together.
        report: told by the main rank what is wrong.
        set_aside: rename a damaged one.
    """

    def __init__(
        self,
        path: Path,
        manifest: dict[str, Any],
        *,
        peers: Peers,
        report: Callable[[str], None],
        set_aside: bool,
    ) -> None:
        self._path = path
        self._block: int = manifest["block"]
        self._files = {name: one for name, one in manifest["files"].items() if "crc32" in one}
        self._peers = peers
        self._report = report
        self._set_aside = set_aside
        self._seen: dict[_Block, list[_Span]] = {}
        self._problems: dict[str, str] = {}  # by file
        self.bytes_read = 0

    def saw(self, file: str, place: int, data: memoryview) -> None:
        """Take note of bytes that were read, from `place` of a file on."""
        done = 0
        while done < len(data):
            number, low = divmod(place + done, self._block)
            piece = data[done : done + self._block - low]
            done += len(piece)
            spans = self._seen.setdefault((file, number), [])
            if spans and spans[-1][1] == low:
                start, _, crc = spans.pop()
                spans.append((start, low + len(piece), zlib.crc32(piece, crc)))
            else:
                spans.append((low, low + len(piece), zlib.crc32(piece)))

    def failed(self, file: str, problem: str) -> None:
        """Take note that a file could not be read. Training must not go on, as `confirm` will say."""
        self._problems.setdefault(file, f"{file} {problem}")

    def confirm(self) -> None:
        """Agree on whether all files are as they were written. Collective: every rank must call.

        Raises:
            DamagedCheckpointError: on every rank, where a byte on any of them is not; the main rank has
                reported it and set the checkpoint aside.
        """
        whole, rest = self._check_own()
        told = self._peers.share((whole, rest))
        seen: dict[_Block, list[_Span]] = {}
        verified = {block for blocks, _ in told for block in blocks}
        for _, spans_of in told:
            for block, spans in spans_of.items():
                seen.setdefault(block, []).extend(spans)
        left = [block for block in self._blocks() if block not in verified]
        for block in left[self._peers.rank :: self._peers.size]:
            self._check(block, seen.get(block, []))
        self._seen.clear()
        found = self._peers.share(list(self._problems.values()))
        problems = list(dict.fromkeys(one for of_rank in found for one in of_rank))
        if not problems:
            return
        text = "; ".join(problems)
        if self._peers.is_main:
            self._report(f"checkpoint {self._path.name} is not used: {text}")
            if self._set_aside:
                rename_invalid(self._path, self._report)
        self._peers.from_main(lambda: None)  # nobody looks for the next one before
        raise DamagedCheckpointError(self._path, f"{self._path}: {text}")

    def _blocks(self) -> Iterable[_Block]:
        return ((name, index) for name, one in self._files.items() for index in range(len(one["crc32"])))

    def _length(self, block: _Block) -> int:
        name, index = block
        return min(self._block, self._files[name]["bytes"] - index * self._block)

    def _check_own(self) -> tuple[list[_Block], dict[_Block, list[_Span]]]:
        """Verify the blocks that this process read whole; return them, and what it read of the others."""
        whole: list[_Block] = []
        rest: dict[_Block, list[_Span]] = {}
        for block, spans in self._seen.items():
            if self._joins(block, spans):
                self._check(block, spans)
                whole.append(block)
            else:
                rest[block] = spans
        return whole, rest

    def _joins(self, block: _Block, spans: list[_Span]) -> bool:
        """Say whether spans make the block, without gaps."""
        reached = 0
        for start, stop, _ in _chain(spans):
            if start != reached:
                return False
            reached = stop
        return reached == self._length(block)

    def _check(self, block: _Block, spans: list[_Span]) -> None:
        """Verify a block from the checksums of what was read of it; what is missing is read now."""
        name, index = block
        if name in self._problems:
            return
        reached, crc, length = 0, 0, self._length(block)
        for start, stop, own in [*_chain(spans), (length, length, 0)]:
            if start > reached:
                crc = self._read(block, reached, start, crc)
            crc, reached = combined_crc(crc, own, stop - start), stop
        if crc != self._files[name]["crc32"][index]:
            self.failed(name, "is not what was written (checksum)")

    def _read(self, block: _Block, start: int, stop: int, crc: int) -> int:
        """Read bytes of a block and return the checksum of it up to there, from that of what lies before."""
        name, index = block
        try:
            with open(self._path / name, "rb", buffering=0) as stream:
                stream.seek(index * self._block + start)
                while start < stop and (data := stream.read(min(stop - start, 2**20))):
                    crc, start = zlib.crc32(data, crc), start + len(data)
                    self.bytes_read += len(data)
        except OSError as error:
            self.failed(name, f"cannot be read ({error.strerror})")
        return crc


def _chain(spans: list[_Span]) -> list[_Span]:
    """Return spans in order, those left out that lie over others."""
    chosen: list[_Span] = []
    reached = 0
    for span in sorted(spans, key=lambda one: (one[0], -one[1])):
        if span[0] >= reached and span[1] > span[0]:
            chosen.append(span)
            reached = span[1]
    return chosen
