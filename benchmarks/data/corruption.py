"""Fourteen ways in which a data set breaks: is each found, named and counted, and are the healthy samples
all delivered?

Each corruption is done to a fresh folder of two tars with 20 real JPEGs; then the data set is indexed (with a
generous budget) and read. Two of them happen after indexing and are found when the sample is read.
"""

import io
import re
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.harness import Benchmark
from selfmask_dist.data import SampleError, open_source
from selfmask_dist.data.build import build_index

NUM_SAMPLES, NUM_CLASSES = 20, 4
Members = list[tuple[str, bytes]]


def picture(number: int, kind: str = "JPEG") -> bytes:
    rng = np.random.default_rng(number)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    small.resize((80, 60), Image.Resampling.BICUBIC).save(buffer, kind)
    return buffer.getvalue()


def healthy(numbers: range) -> Members:
    return [
        member
        for n in numbers
        for member in ((f"{n:03d}.cls", str(n % NUM_CLASSES).encode()), (f"{n:03d}.jpg", picture(n)))
    ]


def write_tar(path: Path, members: Members) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def starts(path: Path) -> dict[str, int]:
    """Member -> where its header is; "" -> the end mark."""
    with tarfile.open(path) as tar:
        found = {info.name: info.offset for info in tar}
        return found | {"": tar.offset}


def rot(data: bytes) -> bytes:
    """The same picture with bits turned inside its compressed part."""
    middle = len(data) * 2 // 3
    return data[:middle] + bytes(byte ^ 0xA5 for byte in data[middle : middle + 24]) + data[middle + 24 :]


@dataclass(frozen=True)
class Corruption:
    """members: changes the second tar's members before packing. file: changes the packed tar.

    lost: the keys that cannot be delivered. says: what the reason must say.
    """

    lost: tuple[str, ...]
    says: str
    members: Callable[[Members], Members] = lambda members: members
    file: Callable[[Path], None] = lambda path: None
    is_late: bool = False  # after indexing: found at run time
    is_lost: bool = True  # False: delivered, with a remark


def change(key: str, data: bytes | None, *, name: str | None = None) -> Callable[[Members], Members]:
    def fn(members: Members) -> Members:
        changed = [((name or k), data) if k == key else (k, d) for k, d in members]
        return [(k, d) for k, d in changed if d is not None]

    return fn


def cut_at(member: str, extra: int) -> Callable[[Path], None]:
    def fn(path: Path) -> None:
        data = path.read_bytes()
        path.write_bytes(data[: starts(path)[member] + extra])

    return fn


def damage_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[starts(path)["015.jpg"] + 130] ^= 0x5A
    path.write_bytes(data)


def rot_in_place(path: Path) -> None:
    data = path.read_bytes()
    old = picture(15)
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, rot(old)))


def join(path: Path) -> None:
    data = path.read_bytes()
    write_tar(path, healthy(range(20, 22)))
    path.write_bytes(data + path.read_bytes())


CORRUPTIONS = {
    "truncated in a picture": Corruption(("019",), "bytes before its end", file=cut_at("019.jpg", 600)),
    "cut between members": Corruption(("",), "end-of-archive mark", file=cut_at("", 0)),
    "damaged header": Corruption(("015",), "header at byte .* is broken|no picture", file=damage_header),
    "duplicate key apart": Corruption(
        ("011",), "appears twice, apart", members=lambda m: [*m, *healthy(range(11, 12))]
    ),
    "members split apart": Corruption(
        ("012",), "no label", members=lambda m: [x for x in m if x[0] != "012.cls"] + [("012.cls", b"0")]
    ),
    "empty picture": Corruption(("013",), "empty picture", members=change("013.jpg", b"")),
    "bytes that are no picture": Corruption(
        ("013",), "no picture", members=change("013.jpg", b"<html>404</html>" * 40)
    ),
    "PNG named jpg": Corruption(
        ("014",), "is png inside", members=change("014.jpg", picture(14, "PNG")), is_lost=False
    ),
    "missing label": Corruption(("016",), "no label", members=change("016.cls", None)),
    "label out of range": Corruption(
        ("016",), "label 9, and there are only 4", members=change("016.cls", b"9")
    ),
    "truncated JPEG": Corruption(("017",), "decoded", members=change("017.jpg", picture(17)[:-400])),
    "bit rot before indexing": Corruption(("017",), "decoded", members=change("017.jpg", rot(picture(17)))),
    "bit rot after indexing": Corruption(("015",), "crc32", file=rot_in_place, is_late=True),
    "two tars joined": Corruption(("",), "two tars joined", file=join, is_lost=False),
}


@dataclass(frozen=True)
class Outcome:
    found: bool
    named: bool
    counted: bool
    delivered: bool

    @property
    def passes(self) -> bool:
        return self.found and self.named and self.counted and self.delivered


def run(folder: Path, corruption: Corruption) -> Outcome:
    """Corrupt a fresh data set, index and read it, and compare with what must be left."""
    write_tar(folder / "a.tar", healthy(range(10)))
    write_tar(folder / "b.tar", corruption.members(healthy(range(10, 20))))
    if not corruption.is_late:
        corruption.file(folder / "b.tar")
    built = build_index(folder, budget=0.5, classes=[f"class {n}" for n in range(NUM_CLASSES)])
    if corruption.is_late:
        corruption.file(folder / "b.tar")
    source = open_source(folder)
    complaints = [(r.shard, r.key, r.reason) for r in built.rejects if r.is_lost == corruption.is_lost]
    delivered, late = set(), []
    for index in range(len(source)):
        try:
            sample = source.read(index)
        except SampleError as error:
            late.append(("b.tar", source.key(index), str(error)))
            continue
        number = int(sample.key)
        same = sample.data == picture(number) or sample.data == picture(number, "PNG")
        if same and sample.label == number % NUM_CLASSES:
            delivered.add(sample.key)
    complaints += late
    right = [c for c in complaints if c[0] == "b.tar" and re.search(corruption.says, c[2])]
    lost = set(corruption.lost) - {""} if corruption.is_lost else set()
    if "appears twice" in corruption.says:
        lost = set()  # the first of the two is good
    wanted = {f"{n:03d}" for n in range(NUM_SAMPLES)} - lost
    keys = {c[1] for c in complaints}
    return Outcome(
        found=bool(right),
        named=set(corruption.lost) <= keys,
        counted=(built.index.num_rejected + len(late) == len(corruption.lost))
        if corruption.is_lost
        else True,
        delivered=wanted <= delivered and not (delivered & lost),
    )


def main(argv: list[str] | None = None) -> int:
    benchmark = Benchmark("data_corruption", __doc__)
    benchmark.parse(argv)
    passed = 0
    for name, corruption in CORRUPTIONS.items():
        folder = Path(tempfile.mkdtemp(prefix="corruption-"))
        try:
            outcome = run(folder, corruption)
        except Exception as error:  # a crash is what must not happen: it is a result, not a stop
            benchmark.figure(name, f"crashed: {error!r}")
            continue
        finally:
            shutil.rmtree(folder)
        passed += outcome.passes
        benchmark.figure(name, "found, named, counted, rest delivered" if outcome.passes else repr(outcome))
    benchmark.figure("corruptions", len(CORRUPTIONS))
    benchmark.figure("handled", passed, min=len(CORRUPTIONS))
    return benchmark.finish()


if __name__ == "__main__":
    sys.exit(main())
