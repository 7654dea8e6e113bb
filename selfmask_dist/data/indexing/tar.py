"""One tar, header by header: WebDataset samples and where their bytes lie, without reading the pictures.

Knows neither labels nor images, only names, offsets and lengths. A key is a member's name up to the first dot
of its last part; consecutive members with one key are a sample. `tarfile` and every sequential reader stop
quietly at a damaged header or at a missing end mark and lose what follows; here each byte of the file is
accounted for: the walk raises, or notes a `Problem` and goes on at the next header that is whole.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from selfmask_dist.common.pictures import is_about_the_data, is_system_file
from selfmask_dist.common.text import some

BLOCK = 512
# folder/name . extension, as webdataset splits it; hidden files are no members, files without extension are
_MEMBER_NAME = re.compile(r"^(?:\./)*((?:.*/)?[^./][^./]*)(?:\.([^/]*))?$")
_SCAN = 1 << 20  # bytes read at a time while looking for the next whole header
_REGULAR, _FOLDER = b"0\x007", b"5"
_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL = b"L", b"K", b"xX", b"g"


@dataclass
class TarSample:
    """Consecutive members that share a key.

    members: extension in lower case ("" where a name has none) -> (offset, length) in bytes.
    """

    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    """Something wrong in a shard. key: the sample that it hit, "" where that is unknown.

    is_lost: False for a remark about a sample that is delivered all the same.
    """

    key: str
    reason: str
    is_lost: bool = True


def walk_samples(path: Path, problems: list[Problem] | None = None) -> Iterator[TarSample]:
    """Yield the samples of one uncompressed tar, in file order.

    problems: where given, damage is noted in it and the walk goes on behind the damage. What systems leave
        behind (hidden files, `Thumbs.db`, `__MACOSX`) and read-mes are left out, and noted with their number.
    Raises ValueError naming the file and the last good member, unless `problems` is given: not a tar,
    compressed, damaged, cut short, two tars joined, a link or a sparse member, a sample with two members of
    one extension.
    """
    sample: TarSample | None = None
    left_out: list[str] = []
    for member in _walk_members(path, problems):
        match = _MEMBER_NAME.match(member.name)
        is_about = is_about_the_data(member.name) and not (sample and match and match.group(1) == sample.key)
        if match is None or is_about or is_system_file(member.name):
            left_out.append(member.name)
            continue
        key, extension = match.group(1), (match.group(2) or "").lower()
        if sample is None or sample.key != key:
            if sample is not None:
                yield sample
            sample = TarSample(key)
        if extension in sample.members:
            if problems is None:
                raise ValueError(
                    f"{path}: member {member.name!r} appears twice in its sample; pack this shard again"
                )
            problems.append(Problem(key, f"member {member.name!r} appears twice in its sample"))
        sample.members.setdefault(extension, (member.offset, member.size))
    if sample is not None:
        yield sample
    if left_out and problems is not None:
        reason = f"{len(left_out)} hidden files, files of a system or texts about the data are no samples"
        problems.append(Problem("", f"{reason} ({some(left_out)})", is_lost=False))


@dataclass(frozen=True)
class _Member:
    name: str
    kind: bytes
    offset: int  # of its bytes
    size: int

    @property
    def end(self) -> int:
        """The byte at which the next header starts: members fill whole blocks."""
        return self.offset + -(-self.size // BLOCK) * BLOCK


def _walk_members(path: Path, problems: list[Problem] | None) -> Iterator[_Member]:
    """Yield the header of every regular file."""
    with open(path, "rb", buffering=0) as file:
        walk = _Walk(path, file.fileno(), problems)
        yield from walk.members()


class _Walk:
    """Keeps the state of one walk: where it is, and the member that it met last."""

    def __init__(self, path: Path, descriptor: int, problems: list[Problem] | None) -> None:
        self.path, self.problems = path, problems
        self.file = descriptor
        self.size = os.fstat(descriptor).st_size
        self.offset = 0
        self.last = "its start"
        self.long_name: str | None = None  # of the member that follows
        self.is_sparse = False

    def members(self) -> Iterator[_Member]:
        while True:
            block = os.pread(self.file, BLOCK, self.offset)
            if len(block) < BLOCK:
                self._end_too_early(len(block))
                return
            if not block.strip(b"\0"):
                if not self._skip_zeros():
                    return
                continue
            member = _parse_header(block, self.offset)
            if member is None:
                if not self._skip_damage(block):
                    return
                continue
            if member.end > self.size and member.offset + member.size > self.size:
                self.last = f"member {self.long_name or member.name!r}"
                self._complain(
                    f"the file ends {member.offset + member.size - self.size} bytes before its end",
                    name=self.long_name or member.name,
                )
                return
            self.offset = member.end
            if (found := self._meet(member)) is not None:
                yield found

    def _meet(self, member: _Member) -> _Member | None:
        """Return a regular file's member under its full name; None for what only describes others."""
        if member.kind in _LONG_NAME + _PAX:
            data = os.pread(self.file, member.size, member.offset)
            if member.kind == _LONG_NAME:
                self.long_name = _text(data.rstrip(b"\0"))
            else:
                records = _pax_records(data)
                self.long_name = records.get("path", self.long_name)
                self.is_sparse |= any(key.startswith("GNU.sparse") for key in records)
            return None
        if member.kind in _LONG_LINK + _PAX_GLOBAL:
            return None
        name, sparse = self.long_name or member.name, self.is_sparse
        self.long_name, self.is_sparse = None, False
        self.last = f"member {name!r}"
        if member.kind == _FOLDER or name.endswith("/"):
            return None
        if member.kind not in _REGULAR or sparse:
            message = f"{self.last} is a link or a special file, which cannot be read by offset"
            if self.problems is None:
                raise ValueError(
                    f"{self.path}: {message};"
                    " pack again with links followed (tar --dereference --hard-dereference)"
                )
            self.problems.append(Problem(_key_of(name), message))
            return None
        return _Member(name, member.kind, member.offset, member.size)

    def _end_too_early(self, rest: int) -> None:
        if self.offset == 0:
            self._not_a_tar("it is empty" if rest == 0 else f"it has {rest} bytes")
        elif rest:
            self._complain("the file ends inside a header")
        else:
            self._complain("the file ends without the end-of-archive mark")

    def _skip_zeros(self) -> bool:
        """Skip the zeros behind the end mark; return whether something follows them, and stand at it."""
        start = self.offset
        while block := os.pread(self.file, _SCAN, self.offset):
            rest = block.lstrip(b"\0")
            if rest:
                self.offset += (len(block) - len(rest)) // BLOCK * BLOCK
                self._complain("more data follows the end-of-archive mark, as in two tars joined", lost=False)
                return True
            self.offset += len(block)
        assert self.offset >= start, (self.path, start)
        return False

    def _skip_damage(self, block: bytes) -> bool:
        """Look for the next whole header and stand at it; return False where there is none."""
        start = self.offset
        while True:
            self.offset += BLOCK
            data = os.pread(self.file, _SCAN, self.offset)
            if len(data) < BLOCK:
                break
            for at in range(0, len(data) - BLOCK + 1, BLOCK):
                if data[at + 257 : at + 262] == b"ustar" and _parse_header(data[at : at + BLOCK], 0):
                    self.offset += at
                    self._damaged_header(start, block)
                    return True
            self.offset += len(data) // BLOCK * BLOCK - BLOCK
        if start == 0:
            self._not_a_tar("no header in it is whole")
        else:
            self._damaged_header(start, block)
        return False

    def _damaged_header(self, at: int, block: bytes) -> None:
        self.long_name, self.is_sparse = None, False
        if at == 0 and self.problems is None:
            self._not_a_tar("its first header is broken")
        guess = _text(block[:100].split(b"\0")[0])
        self._complain(f"the header at byte {at} is broken", name=guess if guess.isprintable() else "")

    def _not_a_tar(self, why: str) -> None:
        if self.problems is None:
            raise ValueError(
                f"{self.path}: not a readable tar ({why}); pack it again, and unpack it first if it is"
                " compressed"
            )
        self.problems.append(Problem("", f"not a readable tar ({why})"))

    def _complain(self, reason: str, *, name: str = "", lost: bool = True) -> None:
        if self.problems is None:
            raise ValueError(
                f"{self.path}: damaged or cut short after {self.last} ({reason}); copy or pack this shard"
                " again"
            )
        self.problems.append(Problem(_key_of(name), f"damaged after {self.last}: {reason}", lost))


def _parse_header(block: bytes, at: int) -> _Member | None:
    """Return the member whose header is `block`; None where its checksum says that it is no header."""
    try:
        stated = int(block[148:156].strip(b"\0 "), 8)
        size = _number(block[124:136])
    except ValueError:
        return None
    if stated != sum(block) - sum(block[148:156]) + 8 * ord(" ") or size < 0:
        return None
    name = block[:100].split(b"\0", 1)[0]
    prefix = block[345:500].split(b"\0", 1)[0] if block[257:263] == b"ustar\0" else b""
    full = prefix + b"/" + name if prefix else name
    return _Member(_text(full), block[156:157], at + BLOCK, size)


def _number(field: bytes) -> int:
    if field[0] & 0x80:  # GNU's way to write what needs more than 11 octal digits
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    return int(field.strip(b"\0 ") or b"0", 8)


def _pax_records(data: bytes) -> dict[str, str]:
    """Return the records `length key=value\\n` of a pax header; length counts the whole record."""
    records: dict[str, str] = {}
    while data.strip(b"\0"):
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(data):
            break
        key, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        records[_text(key)] = _text(value)
        data = data[int(length) :]
    return records


def _text(data: bytes) -> str:
    return data.decode("utf-8", errors="surrogateescape")


def _key_of(name: str) -> str:
    match = _MEMBER_NAME.match(name)
    return match.group(1) if match else name
