"""Killed at random points and resumed on other numbers of ranks and workers: is every sample used once per
epoch, in the same batches, with the same bytes and the same pixels?

Ranks are processes that read one global batch after the other, ended by SIGKILL with whatever they had in
hand. A global batch counts once every rank has it; the next phase starts from the state that was saved with
the last one that counts, on 2 -> 4 -> 1 -> 3 -> ... ranks. The whole is compared, row by row, with a run that
nobody disturbed.
"""

import hashlib
import json
import multiprocessing
import multiprocessing.forkserver
import os
import random
import signal
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.harness import Benchmark
from selfmask_dist.common.preprocessing import Preprocessing
from selfmask_dist.data import BatchLoader, Workers, multicrop_transform, open_source, train_loader
from selfmask_dist.data.build import build_index
from selfmask_dist.data.views.multicrop import Crops

GLOBAL_BATCH, SEED = 24, 7
WORLDS = (2, 4, 1, 3)
PRE = Preprocessing(24, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))
CROPS = (Crops(1, 24, (0.14, 1.0)), Crops(2, 16, (0.05, 0.14)))
Row = tuple[int, int, str]  # sample, crc32 of its bytes, digest of its views


@dataclass(frozen=True)
class Phase:
    """One life of the consumer: its ranks, their workers, and after how many batches the signal falls."""

    world_size: int
    num_workers: int
    batches: int
    delay: float  # seconds after those batches


def make_data(folder: Path, num_samples: int) -> None:
    from benchmarks.data.corruption import write_tar

    for number in range(4):
        members = []
        for n in range(number, num_samples, 4):
            pixels = np.random.default_rng(n).integers(0, 256, (5, 7, 3), dtype=np.uint8)
            path = folder / "picture.jpg"
            Image.fromarray(pixels).resize((42, 30)).save(path, "JPEG")
            members += [(f"{n:06d}.cls", b"%d" % (n % 10)), (f"{n:06d}.jpg", path.read_bytes())]
            path.unlink()
        write_tar(folder / f"shard-{number}.tar", members)
    build_index(folder)


def make_loader(folder: Path, *, rank: int, world_size: int, num_workers: int) -> BatchLoader:
    return train_loader(
        open_source(folder),
        multicrop_transform(PRE, crops=CROPS),
        global_batch_size=GLOBAL_BATCH,
        seed=SEED,
        rank=rank,
        world_size=world_size,
        workers=Workers(num_workers),
    )


def batches(folder: Path, loader: BatchLoader, num_epochs: int) -> Iterator[dict[str, Any]]:
    """A record of each batch from where the loader stands."""
    source = open_source(folder)
    state = loader.state_dict()
    for epoch in range(state["epoch"], num_epochs):
        loader.set_epoch(epoch, first_step=state["step"] if epoch == state["epoch"] else 0)
        step = loader.state_dict()["step"]
        for batch in loader:
            rows = []
            for row, (sample, weight) in enumerate(zip(batch.ids.tolist(), batch.weights, strict=True)):
                if weight > 0:
                    views = b"".join(view[row].numpy().tobytes() for view in batch.views)
                    digest = hashlib.sha256(views).hexdigest()[:16]
                    rows.append([sample, zlib.crc32(source.read(sample).data), digest])
            yield {"epoch": epoch, "step": step, "rows": rows, "state": loader.state_dict()}
            step += 1


def consume(folder: str, log: str, state: Any, rank: int, phase: Phase, num_epochs: int) -> None:
    """One rank, until it is killed or done."""
    loader = make_loader(Path(folder), rank=rank, world_size=phase.world_size, num_workers=phase.num_workers)
    if state is not None:
        loader.load_state_dict(state)
    with open(log, "ab", buffering=0) as file:
        for record in batches(Path(folder), loader, num_epochs):
            file.write(json.dumps(record).encode() + b"\n")
            time.sleep(0.004)  # a training step
    loader.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """Whole lines; a last one that the signal cut is not there."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def run_phase(folder: Path, logs: list[Path], state: Any, phase: Phase, num_epochs: int) -> int:
    """Start the ranks, and kill them once the first has its batches; returns how many were killed."""
    context = multiprocessing.get_context("forkserver")
    arguments = [(str(folder), str(log), state, rank, phase, num_epochs) for rank, log in enumerate(logs)]
    ranks = [context.Process(target=consume, args=args) for args in arguments]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + 300
    while any(process.is_alive() for process in ranks):
        if max(log.read_bytes().count(b"\n") if log.exists() else 0 for log in logs) >= phase.batches:
            break
        if time.monotonic() > deadline:
            raise RuntimeError(f"no progress in five minutes: {phase}")
        time.sleep(0.001)
    time.sleep(phase.delay)
    killed = 0
    for process in ranks:
        if process.is_alive() and process.pid is not None:
            os.kill(process.pid, signal.SIGKILL)
    for process in ranks:
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
    return killed


def commit(logs: list[Path]) -> tuple[list[tuple[int, int, list[Row]]], Any]:
    """The global batches that every rank has, and the state that was saved with the last of them."""
    records = [read_log(log) for log in logs]
    done, state = [], None
    for parts in zip(*records, strict=False):
        places = {(part["epoch"], part["step"]) for part in parts}
        assert len(places) == 1, places
        assert len({json.dumps(part["state"]) for part in parts}) == 1, "ranks save different states"
        rows = sorted(tuple(row) for part in parts for row in part["rows"])
        done.append((*places.pop(), rows))
        state = parts[0]["state"]
    return done, state


def interrupted_run(folder: Path, scratch: Path, kills: int, with_workers: bool, num_epochs: int) -> Any:
    """(global batches, processes killed, phases that a kill ended)."""
    rng = random.Random(3)
    done: list[tuple[int, int, list[Row]]] = []
    state, killed, ended, number = None, 0, 0, 0
    while True:
        world_size = WORLDS[number % len(WORLDS)]
        workers = 1 + number % 2 if with_workers and number % 9 == 3 else 0
        is_last = ended >= kills
        batches_first = 10**9 if is_last else rng.randint(1, 6)
        phase = Phase(world_size, workers, batches_first, rng.random() * 0.02)
        logs = [scratch / f"{number}-{rank}.jsonl" for rank in range(world_size)]
        found = run_phase(folder, logs, state, phase, num_epochs)
        killed, ended = killed + found, ended + (found > 0)
        fresh, saved = commit(logs)
        done += fresh
        state = saved or state
        number += 1
        if is_last:
            return done, killed, ended


def compare(
    reference: list[tuple[int, int, list[Row]]], found: list[tuple[int, int, list[Row]]], num_samples: int
) -> dict[str, int]:
    """Differences, each counted."""
    uses = Counter((epoch, row[0]) for epoch, _, rows in found for row in rows)
    epochs = {epoch for epoch, _, _ in reference}
    batches_differ = payload = pixels = 0
    for (epoch, step, rows), (epoch_, step_, rows_) in zip(reference, found, strict=False):
        batches_differ += (epoch, step, [r[0] for r in rows]) != (epoch_, step_, [r[0] for r in rows_])
        payload += sum(a[1] != b[1] for a, b in zip(rows, rows_, strict=False))
        pixels += sum(a[2] != b[2] for a, b in zip(rows, rows_, strict=False))
    return {
        "samples lost": sum(uses[epoch, n] == 0 for epoch in epochs for n in range(num_samples)),
        "samples repeated": sum(count - 1 for count in uses.values()),
        "batches that differ": batches_differ + abs(len(reference) - len(found)),
        "payloads that differ": payload,
        "augmented pictures that differ": pixels,
    }


def measure(*, kills: int, num_samples: int, num_epochs: int, with_workers: bool) -> dict[str, int]:
    """All counts of one experiment."""
    # ranks are forked from a server that has imported everything, and is no parent of theirs to forgive
    multiprocessing.forkserver.set_forkserver_preload(["benchmarks.data.exactness"])
    with tempfile.TemporaryDirectory(prefix="exactness-") as scratch:
        folder = Path(scratch) / "data"
        folder.mkdir()
        make_data(folder, num_samples)
        whole = make_loader(folder, rank=0, world_size=1, num_workers=0)
        reference = [
            (record["epoch"], record["step"], sorted(tuple(row) for row in record["rows"]))
            for record in batches(folder, whole, num_epochs)
        ]
        found, killed, ended = interrupted_run(folder, Path(scratch), kills, with_workers, num_epochs)
    return compare(reference, found, num_samples) | {
        "global batches": len(found),
        "processes killed": killed,
        "interruptions": ended,
    }


def main(argv: list[str] | None = None) -> int:
    benchmark = Benchmark("data_exactness", __doc__)
    args = benchmark.parse(argv)
    sizes = {"kills": 6, "num_samples": 700} if args.quick else {"kills": 55, "num_samples": 5000}
    counts = measure(**sizes, num_epochs=2, with_workers=True)
    differences = sum(value for name, value in counts.items() if "differ" in name or name.startswith("sam"))
    for name, value in counts.items():
        benchmark.figure(name, value)
    benchmark.figure("differences", differences, max=0)
    benchmark.target("interruptions", min=6 if args.quick else 50)
    return benchmark.finish()


if __name__ == "__main__":
    sys.exit(main())
