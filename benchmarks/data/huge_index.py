"""What a data set of 100 million samples costs every process of a node.

An index of that size is written, its shards are sparse files without pictures, and each figure is from a
fresh process that does one thing. Private memory is what a process has for itself (RssAnon at its highest,
less what its imports took); the index is a mapped file, in memory once for all processes.

`before` is what was done until 2026-11-30: labels as an array that every worker got, an epoch's order made
all at once, each shard looked at by every rank. Order and labels of before are measured at
`--before-samples`, where they fit, and reckoned from there, being proportional to samples. A node of 8 ranks
with 8 workers each is reckoned from one rank and the mean of two workers.

    python -m benchmarks.data.huge_index [--samples N] [--quick] --json
"""

import json
import multiprocessing
import os
import pickle
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.harness import Benchmark
from selfmask_dist.data import Subset, open_source
from selfmask_dist.data.indexing.index import _ALIGN, _COLUMNS, _MAGIC, INDEX_NAME
from selfmask_dist.data.indexing.manifest import find_shards
from selfmask_dist.data.order import EpochOrder, _philox, num_streams, rank_batch
from selfmask_dist.data.storage import LocalStorage

MIB = 2**20
SEED, EPOCH, GLOBAL_BATCH = 3, 5, 4096
NUM_CLASSES, KEY_BYTES, PICTURE_BYTES = 1000, 9, 110_000
RANKS, WORKERS = 8, 8  # of a node
_ROWS = 1 << 20


# ---- the data set


def write_index(folder: Path, num_samples: int, num_shards: int) -> None:
    """Write shards of the right sizes without bytes in them, and their index, a part at a time."""
    per_shard = -(-num_samples // num_shards)
    size = per_shard * (PICTURE_BYTES + 1024) + 1024
    names = [f"{number:06d}.tar" for number in range(num_shards)]
    for name in names:
        with open(folder / name, "wb") as shard:
            shard.truncate(size)
    identity = dict.fromkeys(("shards", "places", "labels", "contents"), "made")
    header = {
        "shards": [[name, size] for name in names],
        "samples": num_samples,
        "key_bytes": num_samples * KEY_BYTES,
        "folders": None,
        "classes": None,
        "has_crc32": True,
        "has_captions": False,
        "num_rejected": 0,
        "identity": {"samples": num_samples, **identity},
    }
    text = json.dumps(header).encode()
    columns: dict[str, Callable[[npt.NDArray[np.int64]], npt.NDArray[Any]]] = {
        "shard": lambda rows: rows // per_shard,
        "offset": lambda rows: rows % per_shard * (PICTURE_BYTES + 1024) + 512,
        "length": lambda rows: np.full(len(rows), PICTURE_BYTES),
        "label": lambda rows: rows * 7919 % NUM_CLASSES,
        "crc32": lambda rows: rows * 2654435761 % 2**32,
        "key_end": lambda rows: (rows + 1) * KEY_BYTES,
    }
    with open(folder / INDEX_NAME, "wb") as file:
        file.write(_MAGIC + len(text).to_bytes(8, "little") + text)
        for name, kind in _COLUMNS.items():
            file.write(bytes(-file.tell() % _ALIGN))
            for start in range(0, num_samples, _ROWS):
                rows = np.arange(start, min(start + _ROWS, num_samples))
                file.write(columns[name](rows).astype(kind).tobytes())
        file.write(bytes(-file.tell() % _ALIGN))
        powers = 10 ** np.arange(KEY_BYTES - 1, -1, -1)
        for start in range(0, num_samples, _ROWS):
            rows = np.arange(start, min(start + _ROWS, num_samples))
            file.write((rows[:, None] // powers % 10 + ord("0")).astype(np.uint8).tobytes())


# ---- a fresh process that does one thing


def in_fresh_process(fn: Callable[..., Any], *args: Any) -> dict[str, Any]:
    """Return seconds, CPU seconds, MiB of private memory at the highest, and what `fn(*args)` returned."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "selfmask_dist.data"])
    ours, theirs = context.Pipe()
    process = context.Process(target=_do, args=(theirs, fn, args))
    process.start()
    theirs.close()
    try:
        found: dict[str, Any] = ours.recv()
    except EOFError:
        raise RuntimeError(f"{fn.__name__} failed; see its traceback above") from None
    finally:
        process.join()
    return found


def _do(connection: Connection, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    before, highest, ended = _private_bytes(), [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.002):
            highest[0] = max(highest[0], _private_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start, worked = time.perf_counter(), time.thread_time()
    result = fn(*args)
    seconds, worked = time.perf_counter() - start, time.thread_time() - worked
    ended.set()
    watcher.join()
    peak = max(highest[0], _private_bytes()) - before
    connection.send({"seconds": seconds, "cpu": worked, "mib": peak / MIB, "result": result})


def _private_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this benchmark reads /proc, which is Linux's")


# ---- what is done


def open_it(folder: Path, trust_index: bool) -> int:
    """Open the source, as rank 0 does or as the others do."""
    source = open_source(folder, trust_index=trust_index)
    return len(source)


def train_some(folder: Path, share: float) -> list[int]:
    """Open the source and make 200 batches of one of 8 ranks, from a share of the epoch on."""
    source = open_source(folder, trust_index=True)
    order = EpochOrder(len(source), seed=SEED, epoch=EPOCH, global_batch_size=GLOBAL_BATCH)
    first = int(share * (len(source) // GLOBAL_BATCH))
    labels = np.zeros(NUM_CLASSES, dtype=np.int64)
    for step in range(first, min(first + 200, len(source) // GLOBAL_BATCH)):
        plan = rank_batch(order, step, epoch=EPOCH, global_batch_size=GLOBAL_BATCH, rank=3, world_size=RANKS)
        labels += np.bincount(source.labels_of(plan.ids), minlength=NUM_CLASSES)
    return [int(labels.sum()), int(plan.ids[0])]


def work(pickled: Path, seed: int) -> int:
    """Do a worker's share but for pictures: receive the source, look up rows and labels of 200 batches."""
    with open(pickled, "rb") as file:
        source = pickle.load(file)
    rng, total = np.random.default_rng(seed), 0
    for _ in range(200):
        ids = rng.integers(0, len(source), GLOBAL_BATCH // RANKS)
        total += int(source.labels_of(ids).sum() % 2)
    return total


def whole_order(num_samples: int, *, seed: int, epoch: int, global_batch_size: int) -> npt.NDArray[np.int64]:
    """Return an epoch's order as runs of before made it, all of it at once: 64 bytes a sample at the peak."""
    words = _philox(seed, epoch, 0, 0)
    length = min(256, max(1, num_samples // 1024))
    count = -(-num_samples // length)
    starts = np.argsort(words.random_raw(count), kind="stable") * length
    ids = (starts[:, None] + np.arange(length)).ravel()
    blocks = ids[ids < num_samples].astype(np.int64, copy=False)
    streams = num_streams(global_batch_size)
    per_stream = num_samples // global_batch_size * (global_batch_size // streams)
    dealt = blocks[: streams * per_stream].reshape(streams, per_stream)
    order = np.empty(num_samples, dtype=np.int64)
    if per_stream:
        place = np.arange(per_stream, dtype=np.uint64)
        windows = np.arange(streams, dtype=np.uint64)[:, None] * np.uint64(-(-per_stream // 4096))
        number = windows + (place >> np.uint64(12))
        noise = words.random_raw(streams * per_stream).reshape(streams, per_stream) >> np.uint64(34)
        keys = number << np.uint64(42) | noise << np.uint64(12) | (place & np.uint64(4095))
        keys.sort(axis=1)
        within = (keys & np.uint64(4095)) | ((place >> np.uint64(12)) << np.uint64(12))
        shuffled = np.take_along_axis(dealt, within.astype(np.int64), axis=1)
        order[: dealt.size] = shuffled.T.ravel()
    order[dealt.size :] = blocks[dealt.size :]
    return order


def order_before(num_samples: int) -> int:
    """Make an epoch's order, as before."""
    found = whole_order(num_samples, seed=SEED, epoch=EPOCH, global_batch_size=GLOBAL_BATCH)
    return int(found[0])


def work_before(pickled: Path) -> int:
    """Receive the labels of all samples, as a worker did before."""
    with open(pickled, "rb") as file:
        labels = pickle.load(file)
    time.sleep(0.05)  # for the thread that watches
    return int(labels[-1])


@contextmanager
def counting() -> Iterator[Counter[str]]:
    """Count what Python asks the file system about tars: `stat`, as `exists` does, and `access`."""
    counts: Counter[str] = Counter()
    stat, access, scandir = os.stat, os.access, os.scandir

    def count_stat(path: Any, *args: Any, **kwargs: Any) -> Any:
        counts["stat"] += str(path).endswith(".tar")
        return stat(path, *args, **kwargs)

    def count_access(path: Any, *args: Any, **kwargs: Any) -> Any:
        counts["access"] += str(path).endswith(".tar")
        return access(path, *args, **kwargs)

    class Entry:
        def __init__(self, entry: Any) -> None:
            self._entry, self.name, self.path = entry, entry.name, entry.path

        def stat(self) -> Any:
            counts["stat"] += self.name.endswith(".tar")
            return self._entry.stat()

        def __getattr__(self, name: str) -> Any:
            return getattr(self._entry, name)

    @contextmanager
    def entries(path: Any = ".") -> Iterator[Iterator[Any]]:
        with scandir(path) as found:
            yield (Entry(entry) for entry in found)

    os.stat, os.access, os.scandir = count_stat, count_access, entries  # type: ignore[assignment]
    try:
        yield counts
    finally:
        os.stat, os.access, os.scandir = stat, access, scandir


def look_before(folder: Path) -> int:
    """Look at every shard as each rank did at its start."""
    with counting() as counts:
        shards = find_shards(str(folder))
        for shard in shards:
            shard.stat()
        LocalStorage(shards)
    return sum(counts.values())


def look_now(folder: Path, trust_index: bool) -> int:
    """Open the source, and return how often the file system was asked about a tar."""
    with counting() as counts:
        open_source(folder, trust_index=trust_index)
    return sum(counts.values())


# ---- figures


def now(benchmark: Benchmark, folder: Path, count: int) -> None:
    """Record what is so now."""
    size = (folder / INDEX_NAME).stat().st_size
    benchmark.figure("samples", count)
    benchmark.figure("index, bytes a sample on the disk, mapped once for all", size / count)
    opened = in_fresh_process(open_it, folder, False)
    benchmark.figure("open by rank 0, s", opened["seconds"], max=10.0)
    opened = in_fresh_process(open_it, folder, True)
    benchmark.figure("open by another rank, s", opened["seconds"], max=10.0)
    benchmark.figure("open, private MiB", opened["mib"], max=64.0)
    ranks = {share: in_fresh_process(train_some, folder, share) for share in (0.0, 0.9)}
    for share, found in ranks.items():
        name = f"open, order and 200 batches of a rank from {share:.0%} of the epoch"
        benchmark.figure(f"{name}, s", found["seconds"], max=20.0)
        benchmark.figure(f"{name}, CPU s", found["cpu"])
        benchmark.figure(f"{name}, private MiB", found["mib"], max=128.0)
    source = open_source(folder, trust_index=True)
    np.save(folder / "part.npy", np.arange(0, count, 2, dtype=np.int64))
    part = Subset.in_file(source, folder / "part.npy")
    for name, what in (("source", source), ("subset of half of it", part)):
        pickled = folder / "pickled"
        pickled.write_bytes(pickle.dumps(what))
        benchmark.figure(f"{name}: MiB sent to a worker", pickled.stat().st_size / MIB, max=4.0)
    workers = [in_fresh_process(work, pickled, seed) for seed in range(2)]
    worker = sum(found["mib"] for found in workers) / len(workers)
    benchmark.figure("a worker, private MiB", worker, max=64.0)
    rank = max(found["mib"] for found in ranks.values())
    node = RANKS * rank + RANKS * WORKERS * worker
    benchmark.figure(
        f"node of {RANKS} ranks x {WORKERS} workers, private GiB (reckoned)", node / 1024, max=4.0
    )


def before(benchmark: Benchmark, folder: Path, count: int, sample: int) -> None:
    """Record what was so before, measured at `sample` samples and reckoned for `count`."""
    factor = count / sample
    ordered = in_fresh_process(order_before, sample)
    benchmark.figure("before: samples that were measured", sample)
    benchmark.figure("before: order, bytes a sample at the peak", ordered["mib"] * MIB / sample)
    benchmark.figure("before: order of all, CPU s (reckoned)", ordered["cpu"] * factor)
    labels = np.arange(sample) % NUM_CLASSES
    (folder / "pickled").write_bytes(pickle.dumps(labels))
    worker = in_fresh_process(work_before, folder / "pickled")
    benchmark.figure("before: labels, bytes a sample in a worker", worker["mib"] * MIB / sample)
    lazy = rank_batch(
        EpochOrder(sample, seed=SEED, epoch=EPOCH, global_batch_size=GLOBAL_BATCH),
        sample // GLOBAL_BATCH // 2,
        epoch=EPOCH,
        global_batch_size=GLOBAL_BATCH,
        rank=3,
        world_size=RANKS,
    )
    whole = whole_order(sample, seed=SEED, epoch=EPOCH, global_batch_size=GLOBAL_BATCH)
    start = sample // GLOBAL_BATCH // 2 * GLOBAL_BATCH
    same = bool((lazy.ids == whole[start : start + GLOBAL_BATCH][3::RANKS]).all())
    benchmark.figure("the order is the one of before, to the bit", int(same), min=1)
    node = factor * (RANKS * (ordered["mib"] + 8 * sample / MIB) + RANKS * WORKERS * worker["mib"])
    benchmark.figure("before: node, private GiB (reckoned)", node / 1024)
    looks = in_fresh_process(look_before, folder)
    benchmark.figure("before: questions about tars, each rank", looks["result"])
    benchmark.figure("before: looking at them, s", looks["seconds"])
    for name, trust_index in (("rank 0", False), ("each other rank", True)):
        looks = in_fresh_process(look_now, folder, trust_index)
        benchmark.figure(f"questions about tars, {name}", looks["result"])
    num_shards = len(list(folder.glob("*.tar")))
    benchmark.figure("shards", num_shards)
    benchmark.target("questions about tars, rank 0", max=num_shards)
    benchmark.target("questions about tars, each other rank", max=0)


def main(argv: list[str] | None = None) -> int:
    benchmark = Benchmark("huge_index", __doc__)
    benchmark.parser.add_argument("--samples", type=int, default=100_000_000)
    benchmark.parser.add_argument("--before-samples", type=int, default=10_000_000)
    benchmark.parser.add_argument(
        "--folder", type=Path, help="where the index is written (4 GB; default: tmp)"
    )
    args = benchmark.parse(argv)
    count = 1_000_000 if args.quick else args.samples
    with tempfile.TemporaryDirectory(prefix="huge-index-", dir=args.folder) as scratch:
        folder = Path(scratch)
        start = time.perf_counter()
        write_index(folder, count, max(count // 10_000, 1))
        benchmark.figure("writing it, s", time.perf_counter() - start)
        now(benchmark, folder, count)
        before(benchmark, folder, count, min(count, args.before_samples))
    return benchmark.finish()


if __name__ == "__main__":
    sys.exit(main())
