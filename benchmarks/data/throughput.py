"""How fast samples arrive, against webdataset and torchvision, on the same shards in the same run.

Without decoding, hot (in the page cache) and cold (dropped from it before each round); with decoding, per
CPU-second; SwAV's views per CPU-second; the time to the first batch at the start and at 90 % of an epoch of a
million samples; and what an index of 2.7 million samples costs. Ratios are medians of interleaved rounds.

mosaicml-streaming has its own format and needs an environment of its own, in which this file runs once more:

    uv venv /tmp/streaming && uv pip install --python /tmp/streaming/bin/python mosaicml-streaming
    python benchmarks/data/throughput.py --json --streaming-python /tmp/streaming/bin/python
"""

import io
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image, ImageFilter
from torchvision import transforms as tv  # type: ignore[import-untyped]

from benchmarks.harness import Benchmark
from selfmask_dist.common.preprocessing import Preprocessing
from selfmask_dist.data import decode, multicrop_transform, open_source, train_loader, train_transform
from selfmask_dist.data.build import build_index
from selfmask_dist.data.indexing.index import INDEX_NAME, Index, Shard, load_index
from selfmask_dist.data.indexing.labels import Labels, resolve_labels
from selfmask_dist.data.order import epoch_order, sample_generator
from selfmask_dist.data.source import READ_TOGETHER, TarSource
from selfmask_dist.data.storage import LocalStorage
from selfmask_dist.data.views.decode import counts
from selfmask_dist.data.views.multicrop import SWAV_CROPS

PRE = Preprocessing(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
NUM_DISTINCT = 40


def photographs() -> list[bytes]:
    """JPEGs of about 27 KB and 375 x 300 pixels, with detail at every scale as in photographs."""
    found = []
    for number in range(NUM_DISTINCT):
        rng = np.random.default_rng(number)
        pixels = np.zeros((300, 375, 3), dtype=np.float32)
        for size in (3, 9, 30, 100, 300):
            noise = Image.fromarray(rng.integers(0, 256, (size, size * 5 // 4, 3), dtype=np.uint8))
            pixels += np.asarray(noise.resize((375, 300), Image.Resampling.BICUBIC)) * (
                0.3 if size < 300 else 0.12
            )
        buffer = io.BytesIO()
        Image.fromarray((pixels * 0.8).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=80)
        found.append(buffer.getvalue())
    return found


def make_shards(folder: Path, num_samples: int, shards: int = 4) -> list[str]:
    """Tars with the members that data_prep writes: picture, class number, JSON."""
    pictures = photographs()
    for shard in range(shards):
        with webdataset.TarWriter(str(folder / f"shard-{shard:06d}.tar"), encoder=False, mtime=0) as tar:
            for n in range(shard, num_samples, shards):
                data, name = pictures[n % NUM_DISTINCT], f"class{n % 100}/{n:07d}"
                about = {"class": f"class{n % 100}", "path": f"{name}.jpg", "crc32": zlib.crc32(data)}
                label = b"%d" % (n % 100)
                tar.write({"__key__": name, "jpg": data, "cls": label, "json": json.dumps(about).encode()})
    build_index(folder, decode_check=False)
    return sorted(str(path) for path in folder.glob("*.tar"))


def drop_from_cache(paths: list[str]) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def load_into_cache(paths: list[str]) -> None:
    """As an epoch before this one leaves them: read from the disk, not just written."""
    drop_from_cache(paths)
    for path in paths:
        with open(path, "rb") as file:
            while file.read(1 << 20):
                pass


def read_webdataset(urls: list[str]) -> Iterator[dict[str, Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves closing to the collector
        yield from webdataset.WebDataset(urls, shardshuffle=False)


def rates(
    fns: dict[str, Callable[[], int]],
    *,
    rounds: int,
    clock: Callable[[], float],
    before: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Samples per second of `clock`, in turns."""
    found: dict[str, list[float]] = {name: [] for name in fns}
    for turn in range(rounds + 1):
        for name, fn in fns.items():
            before()
            start = clock()
            number = fn()
            if turn:
                found[name].append(number / (clock() - start))
    return found


def median_ratio(found: dict[str, list[float]], mine: str, base: str) -> float:
    return float(np.median([a / b for a, b in zip(found[mine], found[base], strict=True)]))


@contextmanager
def streaming_reader(benchmark: Benchmark, folder: Path, python: str | None) -> Iterator[dict[str, Any]]:
    """mosaicml-streaming's epoch, in the environment of `python`; nothing where that is None."""
    if python is None:
        benchmark.figure("mosaicml-streaming", "skipped: no --streaming-python")
        yield {}
        return
    script = Path(__file__).with_name("streaming_reader.py")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with subprocess.Popen(
        [python, str(script), str(folder), str(folder / "mds")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise RuntimeError(f"{python} cannot run mosaicml-streaming; its error is above")

        def epoch() -> int:
            print("epoch", file=process.stdin, flush=True)
            return int(process.stdout.readline())  # type: ignore[union-attr]

        yield {"mosaicml-streaming": epoch}
        process.stdin.close()


def reading(
    benchmark: Benchmark, folder: Path, urls: list[str], rounds: int, others: dict[str, Callable[[], int]]
) -> None:
    source = open_source(folder)
    unchecked = open_source(folder)
    unchecked.verify = False
    order = epoch_order(len(source), seed=0, epoch=0, global_batch_size=256)
    in_order = np.arange(len(source))

    def read(which: TarSource, rows: Any) -> int:
        number = 0
        for start in range(0, len(rows), READ_TOGETHER):
            for data in which.read_many(rows[start : start + READ_TOGETHER]):
                assert type(data) is bytes
                number += 1
        return number

    fns = {
        "webdataset": lambda: sum(1 for _ in read_webdataset(urls)),
        "sequential": lambda: read(unchecked, in_order),
        "shuffled": lambda: read(unchecked, order),
        "shuffled, checksums": lambda: read(source, order),
    }
    files = urls + [str(path) for path in folder.glob("mds/*.mds")]
    load_into_cache(files)
    for state, before in (("hot", lambda: None), ("cold", lambda: drop_from_cache(files))):
        found = rates(fns | others, rounds=rounds, clock=time.perf_counter, before=before)
        benchmark.figure(f"webdataset {state}, samples/s", float(np.median(found["webdataset"])))
        for name in others:
            benchmark.figure(f"shuffled / {name} shuffled, {state}", median_ratio(found, "shuffled", name))
        for name in list(fns)[1:]:
            target = 20.0 if (state, name) in {("hot", "sequential"), ("hot", "shuffled")} else None
            benchmark.figure(
                f"{name} / webdataset, {state}", median_ratio(found, name, "webdataset"), min=target
            )


def decoding(benchmark: Benchmark, folder: Path, urls: list[str], rounds: int) -> None:
    source = open_source(folder)
    order = epoch_order(len(source), seed=0, epoch=0, global_batch_size=256)[:400].tolist()

    def theirs() -> int:
        stream = webdataset.WebDataset(urls, shardshuffle=False).decode("pil")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            return sum(
                np.asarray(sample["jpg"]).ndim == 3 for _, sample in zip(range(400), stream, strict=False)
            )

    def ours() -> int:
        return sum(np.asarray(decode(source.read(row).data)).ndim == 3 for row in order)

    counts.clear()
    found = rates({"webdataset": theirs, "ours": ours}, rounds=rounds, clock=time.process_time)
    benchmark.figure("decoders used", dict(counts))
    benchmark.figure("webdataset decoded, images/CPU-s", float(np.median(found["webdataset"])))
    benchmark.figure("decoded / webdataset, per CPU-s", median_ratio(found, "ours", "webdataset"), min=1.4)


class PILBlur:
    """SwAV's own blur."""

    def __call__(self, image: Image.Image) -> Image.Image:
        if np.random.default_rng().random() > 0.5:
            return image
        return image.filter(ImageFilter.GaussianBlur(float(torch.rand(()) * 1.9 + 0.1)))


def torchvision_views() -> Callable[[Image.Image], list[torch.Tensor]]:
    """SwAV's pipeline as published, on PIL images."""
    color = [
        tv.RandomApply([tv.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8),
        tv.RandomGrayscale(0.2),
        PILBlur(),
    ]
    end = [tv.ToTensor(), tv.Normalize(PRE.mean, PRE.std)]
    pipelines = [
        tv.Compose([tv.RandomResizedCrop(c.size, scale=c.scale), tv.RandomHorizontalFlip(), *color, *end])
        for c in SWAV_CROPS
        for _ in range(c.count)
    ]
    return lambda image: [pipeline(image) for pipeline in pipelines]


def swav_views(benchmark: Benchmark, folder: Path, rounds: int, number: int) -> None:
    source = open_source(folder)
    pipeline = torchvision_views()
    transforms = {flag: multicrop_transform(PRE, on_device=flag) for flag in (False, True)}

    def run(fn: Callable[[Image.Image, int], Any]) -> int:
        for row in range(number):
            fn(decode(source.read(row).data), row)
        return number

    def torchvision_decoded() -> int:
        for row in range(number):
            pipeline(Image.open(io.BytesIO(source.read(row).data)).convert("RGB"))
        return number

    def transform(flag: bool) -> Callable[[], int]:
        return lambda: run(lambda im, i: transforms[flag](im, sample_generator(seed=0, epoch=0, sample=i)))

    fns = {
        "torchvision": torchvision_decoded,
        "all on the CPU": transform(False),
        "crops on the CPU": transform(True),
    }
    found = rates(fns, rounds=rounds, clock=time.process_time)
    for name in fns:
        benchmark.figure(f"SwAV images/CPU-s, {name}", float(np.median(found[name])))
    benchmark.figure(
        "SwAV crops on the CPU / torchvision", median_ratio(found, "crops on the CPU", "torchvision"), min=4.0
    )
    benchmark.figure(
        "SwAV all on the CPU / torchvision", median_ratio(found, "all on the CPU", "torchvision"), min=4.0
    )


def large_index(count: int, shard: Path) -> Index:
    """An index of `count` samples, all of them the pictures that one shard really has."""
    real = open_source(shard.parent).index
    rows = np.flatnonzero(real.shard == 0)
    rows = np.resize(rows, count)
    keys = "".join(f"{n:012d}/{n:012d}" for n in range(count)).encode()
    return Index(
        shards=(Shard(shard.name, shard.stat().st_size),),
        shard=np.zeros(count, dtype=np.int32),
        offset=real.offset[rows],
        length=real.length[rows],
        label=real.label[rows],
        crc32=real.crc32[rows],
        key_end=np.arange(1, count + 1, dtype=np.uint32) * 25,
        keys=np.frombuffer(keys, dtype=np.uint8),
        folders=None,
        classes=None,
        has_crc32=True,
    )


def first_batch(benchmark: Benchmark, folder: Path, count: int) -> None:
    shard = sorted(folder.glob("*.tar"))[0]
    index = large_index(count, shard)
    source = TarSource(index, folder, LocalStorage([shard]), Labels(index), tuple(map(str, range(100))))
    seconds = {}
    for share in (0.0, 0.9, 0.0, 0.9):  # the first two warm up
        loader = train_loader(
            source, train_transform(PRE), global_batch_size=256, seed=0, rank=1, world_size=8
        )
        state = loader.state_dict() | {"step": int(share * len(loader))}
        start = time.perf_counter()
        loader.load_state_dict(state)
        next(iter(loader))
        seconds[share] = time.perf_counter() - start
    for share, value in seconds.items():
        benchmark.figure(f"first batch at {share:.0%} of {count:,}, s", value, max=10.0)
    benchmark.figure("first batch, 90 % / 0 %", seconds[0.9] / seconds[0.0], max=2.0)


def index_costs(benchmark: Benchmark, folder: Path, count: int) -> None:
    path = folder / "large" / INDEX_NAME
    path.parent.mkdir()
    large_index(count, sorted(folder.glob("*.tar"))[0]).save(path)
    start = time.perf_counter()
    index = load_index(path)
    resolve_labels(index, "", classes=None, require_labels=True)
    benchmark.figure(f"index of {count:,}: open, s", time.perf_counter() - start, max=2.0)
    benchmark.figure("index: bytes per sample", path.stat().st_size / count, max=64)
    start = time.perf_counter()
    epoch_order(count, seed=0, epoch=0, global_batch_size=256)
    benchmark.figure(f"order of {count:,}, s", time.perf_counter() - start, max=0.5, quick=False)


def main(argv: list[str] | None = None) -> int:
    benchmark = Benchmark("data_throughput", __doc__)
    benchmark.parser.add_argument(
        "--streaming-python", metavar="PATH", help="interpreter of an environment with mosaicml-streaming"
    )
    args = benchmark.parse(argv)
    torch.set_num_threads(1)
    rounds = 2 if args.quick else 5
    with tempfile.TemporaryDirectory(prefix="throughput-") as scratch:
        folder = Path(scratch)
        urls = make_shards(folder, 1000 if args.quick else 4000)
        with streaming_reader(benchmark, folder, args.streaming_python) as others:
            reading(benchmark, folder, urls, rounds if args.quick else 11, others)
        decoding(benchmark, folder, urls, rounds)
        swav_views(benchmark, folder, rounds, 10 if args.quick else 40)
        first_batch(benchmark, folder, 100_000 if args.quick else 1_000_000)
        index_costs(benchmark, folder, 200_000 if args.quick else 2_700_000)
    return benchmark.finish()


if __name__ == "__main__":
    sys.exit(main())
