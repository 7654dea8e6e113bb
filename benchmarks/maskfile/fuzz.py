"""Mutated mask files: each is refused, or read as what it says; none crashes, hangs or grows.

Every mutation is made twice: as it is, where the checksum must catch it, and signed again, where each number
of header and sections must be checked by itself. A mutation that is signed again may describe another valid
mask; then what is read must be well formed: the header's shapes, its counts of kept weights.

    python benchmarks/maskfile/fuzz.py [--files 100000] --json
"""

import hashlib
import json
import struct
import sys
import tempfile
import time
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard

from benchmarks.harness import Benchmark
from selfmask_dist.maskfile import (
    Head,
    Mask,
    MaskFile,
    MaskFileError,
    Model,
    container,
    forms,
    read_mask_file,
    write_mask_file,
)

MAX_WEIGHTS = 200_000
MAX_MEMORY = 64 * 2**20


def originals(folder: Path) -> list[Path]:
    """A file of each make: entropy coded, against another mask, plain, with statistics and tensors; and with
    every kind of mask, its bits of single weights and of blocks.
    """
    generator = torch.Generator().manual_seed(0)
    shares = {"a": 0.99, "b": 0.5, "c": 0.02, "d": 1.0}
    bits = {name: torch.rand(40, 50, generator=generator) < share for name, share in shares.items()}
    flipped = {
        name: tensor ^ (torch.rand(40, 50, generator=generator) < 0.01) for name, tensor in bits.items()
    }
    base = Mask(
        bits, "f" * 64, num_segments={"a": 4}, statistics={"mean": torch.randn(8, generator=generator)}
    )
    against = Mask(flipped, "f" * 64, against="base")
    tensors = {"router.n": torch.arange(5), "flag": torch.tensor([True, False])}
    files = {
        "entropy": MaskFile({"base": base}, backbone="timm:x", metrics={"knn20": 0.5}),
        "against": MaskFile({"base": base, "other": against}, tensors=tensors),
        "plain": MaskFile({"base": base}),
    }
    files["forms"] = MaskFile({kind: of_kind(kind, generator) for kind in forms.KINDS})
    files["forms plain"] = files["forms"]
    head = Head("linear", torch.randn(3, 4, generator=generator), torch.zeros(3), norm="l2", scale=8.0)
    about = {"name": "timm:x", "kwargs": {"depth": 2}}
    files["model"] = MaskFile({"base": base}, models={"base": Model(head, ("a", "b", "c"), about, "token")})
    for name, file in files.items():
        codec_name = "packbits-zstd" if name.endswith("plain") else "entropy"
        write_mask_file(folder / f"{name}.mask", file, codec_name=codec_name)
    return [folder / f"{name}.mask" for name in files]


def of_kind(kind: Any, generator: torch.Generator) -> Mask:
    """A mask of a kind: one parameter with two scaled parts, and one whose bits are of blocks."""
    weights = {name: torch.randn(40, 50, generator=generator) for name in "ab"}
    blocks = {} if kind in forms.KEEPS_ALL else {"b": (16, 8)}
    bits = {name: torch.rand(40, 50, generator=generator) < 0.6 for name in "ab"}
    if kind in forms.KEEPS_ALL:
        bits = {name: torch.ones_like(kept) for name, kept in bits.items()}
    else:
        bits["b"] = forms.from_grid(bits["b"][:3, :7], [40, 50], blocks["b"])
    parts: dict[str, Any] = {}
    for name, kept in bits.items():
        num_parts = 2 if name == "a" else 1
        scales = torch.rand(
            num_parts, forms.NUM_SCALES.get(kind, 0), generator=generator, dtype=torch.float64
        )
        if kind in forms.NUM_SCALES:
            parts.setdefault("scales", {})[name] = scales
        if kind in forms.WITH_SIGNS:
            parts.setdefault("signs", {})[name] = (weights[name] < 0) & kept
        if kind in forms.WITH_VALUES:
            parts.setdefault("values", {})[name] = weights[name][kept]
    return Mask(bits, "f" * 64, kind=kind, num_segments={"a": 2}, blocks=blocks, **parts)


def mutate(data: bytes, generator: np.random.Generator) -> bytes:
    """Bytes changed, cut out, doubled or put in, or the end lost."""
    out = bytearray(data)
    for _ in range(int(generator.integers(1, 4))):
        at, length = int(generator.integers(len(out))), int(generator.integers(1, 16))
        kind = generator.integers(5)
        if kind == 0:
            out[at] ^= 1 << int(generator.integers(8))
        elif kind == 1:
            out[at : at + length] = generator.bytes(length)
        elif kind == 2:
            del out[at : at + length]
        elif kind == 3:
            out[at:at] = out[at : at + length]
        else:
            del out[at:]
        if not out:
            out = bytearray(b"\0")
    return bytes(out)


def mutate_header(header: Any, generator: np.random.Generator) -> Any:
    """One value, anywhere in the header, replaced by something unsuitable."""
    values: list[Any] = [
        None,
        -1,
        0,
        1,
        2**31,
        2**63,
        1e308,
        "",
        "x",
        [],
        {},
        [0, 1, 2],
        [[]],
        True,
        {"a": 1},
    ]
    if isinstance(header, dict | list) and len(header) and generator.random() < 0.9:
        keys = list(header) if isinstance(header, dict) else range(len(header))
        key = keys[int(generator.integers(len(keys)))]
        copy = header.copy()
        if isinstance(copy, dict) and generator.random() < 0.1:
            del copy[key]
        else:
            copy[key] = mutate_header(copy[key], generator)
        return copy
    if isinstance(header, int) and generator.random() < 0.5:
        return header + int(generator.integers(-3, 4))
    return values[int(generator.integers(len(values)))]


def signed(header: Any, sections: bytes) -> bytes:
    coded = zstandard.compress(json.dumps(header).encode())
    prefix = struct.pack("<8sIQ", container.MAGIC, container.VERSION_WITH_FORMS, len(coded))
    body = prefix + hashlib.sha256(prefix + coded).digest() + coded + sections
    return body + hashlib.sha256(body).digest()


def make(path: Path, turn: int, generator: np.random.Generator) -> bytes:
    """Turns of three: bytes changed; the header changed and signed; a section changed and signed."""
    data, whole = path.read_bytes(), container.read(path)
    sections = data[len(data) - 32 - whole.num_bytes : -32]
    if turn % 3 == 0:
        return mutate(data, generator)
    if turn % 3 == 1:
        return signed(mutate_header(whole.header, generator), sections)
    header = json.loads(json.dumps(whole.header))
    masks = list(header["masks"].values())
    entries = masks[int(generator.integers(len(masks)))]["parameters"]
    entry = entries[int(generator.integers(len(entries)))]
    places = [key for key in ("section", "signs") if key in entry]
    holders = [(entry, key) for key in places]
    if "values" in entry:
        holders.append((entry["values"], "section"))
    holder, key = holders[int(generator.integers(len(holders)))]
    offset, length, _ = holder[key]
    if length == 0:
        return mutate(data, generator)
    section = mutate(sections[offset : offset + length], generator)
    holder[key] = [len(sections), len(section), zlib.crc32(section)]
    return signed(header, sections + section)


def is_well_formed(file: MaskFile, path: Path) -> bool:
    """Whether what was read has the shapes and counts that the header states, and makes such a theta."""
    for name, described in container.read(path).header["masks"].items():
        entries = {entry["name"]: entry for entry in described["parameters"]}
        bits = file.masks[name].bits
        if bits.keys() != entries.keys():
            return False
        for key, entry in entries.items():
            if list(bits[key].shape) != entry["shape"] or int(bits[key].sum()) != sum(entry["kept"]):
                return False
            theta = forms.materialize(file.masks[name], key, torch.ones(entry["shape"]))
            if theta.shape != bits[key].shape:
                return False
    return True


def fuzz(num_files: int, seed: int = 0) -> dict[str, Any]:
    """Counts of what became of the files, and the worst time and memory of a single one."""
    generator = np.random.default_rng(seed)
    found = {"refused": 0, "read": 0, "crashed": 0, "malformed": 0, "wrong": 0}
    slowest, largest = 0.0, 0
    with tempfile.TemporaryDirectory() as folder:
        paths = originals(Path(folder))
        contents = {path: path.read_bytes() for path in paths}
        mutated = Path(folder) / "mutated.mask"
        tracemalloc.start()
        for turn in range(num_files):
            path = paths[int(generator.integers(len(paths)))]
            data = make(path, turn, generator)
            mutated.write_bytes(data)
            tracemalloc.reset_peak()
            before, start = tracemalloc.get_traced_memory()[0], time.perf_counter()
            try:
                file = read_mask_file(mutated, max_weights=MAX_WEIGHTS)
            except MaskFileError:
                found["refused"] += 1
            except Exception as error:  # what is looked for
                found["crashed"] += 1
                print(f"{path.name}, turn {turn}: {type(error).__name__}: {error}", file=sys.stderr)
            else:
                found["read"] += 1
                found["malformed"] += not is_well_formed(file, mutated)
                found["wrong"] += turn % 3 == 0 and data != contents[path]
            slowest = max(slowest, time.perf_counter() - start)
            largest = max(largest, tracemalloc.get_traced_memory()[1] - before)
        tracemalloc.stop()
    return {**found, "slowest_ms": slowest * 1e3, "largest_mib": largest / 2**20}


def main() -> int:
    bench = Benchmark("mask_fuzz", __doc__)
    bench.parser.add_argument("--files", type=int, default=100_000)
    options = bench.parse()
    num_files = 2000 if options.quick else options.files
    bench.figure("files", num_files)
    for name, value in fuzz(num_files).items():
        bench.figure(name, value)
    for name in ("crashed", "malformed", "wrong"):
        bench.target(name, max=0)
    bench.target("slowest_ms", max=1000)
    bench.target("largest_mib", max=MAX_MEMORY / 2**20)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
