"""How the calls and seconds of a cascade's combination grow with the data.

Stores of a dispatcher and five experts, filled with random embeddings of 32 dimensions, are combined: the
combination is fitted on all rows, chunk by chunk, and one embedding for each row is written to a store.
Counted are the calls of the file system that Python makes (open, stat, list, rename, mkdir) and seconds,
which include the writing to disk (a machine that others use makes them uneven, so that the bound is on
seconds of the processor). Beside it, at the smaller sizes, what was done until 2026-11-30: every
chunk opened all stores again, asked for each of their chunks, and loaded all clusters.

    python -m benchmarks.cascade.combine [--quick] --json
"""

import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Benchmark
from selfmask_dist.cascade import Combination
from selfmask_dist.cascade.parts import Parts, combine_to_store
from selfmask_dist.evals.store import EmbeddingStore, chunk_size_for

_EXPERTS, _DIM = 5, 32
_EVENTS = ("open", "os.listdir", "os.scandir", "os.rename", "os.mkdir")


@dataclass
class Calls:
    """Calls of the file system of this process since the start of its counting."""

    number: int = 0
    is_on: bool = False

    def start(self) -> None:
        """Count from now on; an audit hook cannot be taken away again, so there is one of these."""
        sys.addaudithook(lambda event, _: self._add() if event in _EVENTS else None)
        stat = os.stat

        def counted(*args: Any, **kwargs: Any) -> Any:
            self._add()
            return stat(*args, **kwargs)

        os.stat = counted

    def _add(self) -> None:
        self.number += self.is_on

    @contextlib.contextmanager
    def counted(self) -> Iterator[dict[str, float]]:
        """Yield a table that holds calls and seconds when the block has ended."""
        found: dict[str, float] = {}
        self.number, self.is_on = 0, True
        start, busy = time.perf_counter(), time.process_time()
        yield found
        self.is_on = False
        seconds, busy = time.perf_counter() - start, time.process_time() - busy
        found |= {"calls": self.number, "seconds": round(seconds, 3), "cpu seconds": round(busy, 3)}


def make_store(folder: Path, rows: int, batch: int) -> EmbeddingStore:
    """Make an empty store as a cascade has them."""
    return EmbeddingStore.create(
        folder, num_samples=rows, dim=_DIM, provenance={}, chunk_size=chunk_size_for(rows, batch)
    )


def fill(folder: Path, rows: int, batch: int) -> list[Path]:
    """Write stores of a dispatcher and of experts, and the clusters; return the stores' folders."""
    generator = torch.Generator().manual_seed(0)
    folders = [folder / str(view) for view in range(1 + _EXPERTS)]
    for place in folders:
        store = make_store(place, rows, batch)
        for chunk in range(store.num_chunks):
            size = len(store.chunk_range(chunk))
            store.write_chunk(chunk, torch.randn(size, _DIM, generator=generator), torch.zeros(size))
    np.save(folder / "clusters.npy", np.random.default_rng(0).integers(0, _EXPERTS, rows))
    return folders


def combine(folder: Path, folders: list[Path], rows: int, batch: int, calls: Calls) -> dict[str, Any]:
    """Fit a combination and write its embeddings; return the calls and seconds of both."""
    with calls.counted() as fit:
        parts = Parts.open(folders, folder / "clusters.npy")
        combination = Combination.fit(parts.slices(), mode="conditional", num_experts=_EXPERTS).rounded()
    with calls.counted() as write:
        combine_to_store(combination, parts, make_store(folder / "combined", rows, batch))
    return {
        "rows": rows,
        "chunks": parts.stores[0].num_chunks,
        **{name: round(fit[name] + write[name], 3) for name in fit},
        "fit": fit,
        "write": write,
    }


def reopen(folder: Path, folders: list[Path], calls: Calls) -> dict[str, float]:
    """Do for each chunk what was done before the chunk was read, and nothing more."""
    store = EmbeddingStore.open(folders[0])
    paths = [[place / f"{chunk:05d}.safetensors" for chunk in range(store.num_chunks)] for place in folders]
    with calls.counted() as found:
        for _ in range(store.num_chunks):
            for chunks in (*paths, paths[0]):  # the dispatcher's once more, for the labels
                assert all(path.exists() for path in chunks)
            torch.from_numpy(np.load(folder / "clusters.npy"))
    return found


def main() -> int:
    benchmark = Benchmark("cascade_combine", __doc__)
    benchmark.parser.add_argument("--folder", type=Path, help="where the stores lie for a while")
    args = benchmark.parse()
    calls = Calls()
    calls.start()
    sizes = [20_000, 40_000, 80_000] if args.quick else [125_000, 250_000, 500_000, 1_000_000]
    batch = 8 if args.quick else 64  # chunks of 16 batches at all sizes
    found, before = [], []
    for rows in sizes:
        folder = Path(tempfile.mkdtemp(prefix="combine-", dir=args.folder))
        try:
            folders = fill(folder, rows, batch)
            found.append(combine(folder, folders, rows, batch, calls))
            if rows <= sizes[1]:
                before.append({"rows": rows, **reopen(folder, folders, calls)})
        finally:
            shutil.rmtree(folder)
        print(found[-1], file=sys.stderr, flush=True)
    benchmark.figure("views", 1 + _EXPERTS)
    benchmark.figure("dimensions of an embedding", _DIM)
    benchmark.figure("by rows", found)
    benchmark.figure("opening alone, as it was", before)
    first, last = found[0], found[-1]
    growth = last["rows"] / first["rows"]
    benchmark.figure("rows, last / first", growth)
    for what, most in (("calls", 1.05), ("cpu seconds", 1.3), ("seconds", None)):
        ratio = last[what] / first[what] / growth
        benchmark.figure(f"{what} of a row, last / first", ratio, max=most, quick=what == "calls")
    more_rows = before[-1]["rows"] / before[0]["rows"]
    ratio = before[-1]["calls"] / before[0]["calls"] / more_rows
    benchmark.figure("calls of a row as it was, second / first", ratio)
    return benchmark.finish()


if __name__ == "__main__":
    sys.exit(main())
