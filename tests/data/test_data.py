"""Order and loader: nothing lost, nothing repeated, the same pixels with any number of ranks and workers."""

import json
import math
import multiprocessing
import pickle
import random
import signal
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats  # type: ignore[import-untyped]

from selfmask_dist.common.preprocessing import Preprocessing
from selfmask_dist.data import (
    Batch,
    BatchLoader,
    Quarantine,
    QuarantineError,
    SampleError,
    Source,
    Workers,
    decode,
    eval_loader,
    eval_transform,
    open_source,
    train_loader,
    train_transform,
)
from selfmask_dist.data.order import epoch_order, num_steps, num_streams, rank_batch, sample_generator
from selfmask_dist.data.workers import WorkerKind, ahead
from tests.support.tars import labelled, numbered_tars, picture, write_tar

PRE = Preprocessing(24, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
# (2700, ...) has several samples in a block
SHAPES = [(2700, 4), (1, 1), (7, 2), (64, 4), (65, 4), (66, 4), (23, 3), (5, 8)]  # samples, world size


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return numbered_tars(tmp_path_factory.mktemp("tars"))


# ---- order


@pytest.mark.parametrize(("num_samples", "world_size"), SHAPES)
def test_each_sample_once_per_epoch_over_all_ranks(num_samples: int, world_size: int) -> None:
    size = 2 * world_size
    order = epoch_order(num_samples, seed=3, epoch=5, global_batch_size=size)
    seen = []
    for step in range(num_steps(num_samples, global_batch_size=size)):
        batches = [
            rank_batch(order, step, epoch=5, global_batch_size=size, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        real = sum(int(batch.weights.sum()) for batch in batches)
        assert {len(batch.ids) for batch in batches} == {math.ceil(real / world_size)}
        assert {batch.global_count for batch in batches} == {real}
        seen += [int(i) for b in batches for i, w in zip(b.ids, b.weights, strict=True) if w]
    assert sorted(seen) == list(range(num_samples))


@pytest.mark.parametrize("world_size", [2, 3, 4, 6, 12])
def test_global_batch_does_not_depend_on_the_world_size(world_size: int) -> None:
    order = epoch_order(41, seed=0, epoch=0)
    for step in range(num_steps(41, global_batch_size=12)):
        alone = rank_batch(order, step, epoch=0, global_batch_size=12, rank=0, world_size=1)
        assert alone.weights.all(), "one rank never pads"
        for rank in range(world_size):
            part = rank_batch(order, step, epoch=0, global_batch_size=12, rank=rank, world_size=world_size)
            assert part.ids[part.weights > 0].tolist() == alone.ids[rank::world_size].tolist()
            assert set(part.ids.tolist()) <= set(alone.ids.tolist()), (
                "padding repeats the batch's own samples"
            )


def test_order_is_a_function_of_seed_and_epoch() -> None:
    # written down: another order would break the resume of every run that exists
    assert epoch_order(10, seed=0, epoch=0, global_batch_size=2).tolist() == [2, 3, 1, 4, 9, 7, 0, 5, 8, 6]
    assert epoch_order(10, seed=1, epoch=3, global_batch_size=3).tolist() == [5, 4, 9, 2, 1, 0, 3, 6, 7, 8]
    orders = {tuple(epoch_order(50, seed=seed, epoch=epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


@pytest.mark.parametrize("global_batch_size", [1, 4, 8])
def test_order_is_uniform(global_batch_size: int) -> None:
    orders = [epoch_order(8, seed=0, epoch=e, global_batch_size=global_batch_size) for e in range(2000)]
    places = np.array(orders)
    counts = np.array([np.bincount(places[:, place], minlength=8) for place in range(8)])
    assert stats.chisquare(counts.ravel()).pvalue > 1e-3


def test_a_batch_takes_equally_of_each_stream_and_a_rank_its_streams() -> None:
    num_samples, size, world_size = 4096 * 300, 256, 4
    streams = num_streams(size)
    order = epoch_order(num_samples, seed=0, epoch=0, global_batch_size=size)
    assert (np.sort(order) == np.arange(num_samples)).all()
    dealt = order.reshape(-1, streams)
    # a stream reads few blocks at a time: within one window, those of 4096 samples
    assert len(np.unique(dealt[:4096, 3] // 256)) <= 17
    # ... and what it reads comes from everywhere
    assert np.ptp(dealt[:4096].ravel()) > 0.95 * num_samples
    for rank in range(world_size):
        ids = rank_batch(order, 7, epoch=0, global_batch_size=size, rank=rank, world_size=world_size).ids
        own = np.arange(rank, streams, world_size)
        step = dealt[7 * size // streams : 8 * size // streams]
        assert sorted(ids.tolist()) == sorted(step[:, own].ravel().tolist())


def test_streams_divide_the_batch() -> None:
    assert [num_streams(size) for size in (1, 6, 64, 67, 96, 256, 1000)] == [1, 6, 64, 1, 48, 64, 50]


def test_augmentation_streams_are_distinct_and_repeat() -> None:
    def draw(**address: int) -> float:
        return float(sample_generator(**address).random())

    addresses = [{"seed": s, "epoch": e, "sample": i} for s in (0, 1) for e in (0, 1) for i in range(20)]
    draws = [draw(**address) for address in addresses]
    assert len(set(draws)) == len(draws)
    assert draws == [draw(**address) for address in addresses]
    assert draw(seed=2**64 - 1, epoch=0, sample=0) != draw(seed=0, epoch=0, sample=0)


# ---- loader


def same(a: Batch, b: Batch) -> bool:
    pairs = [
        *zip(a.views, b.views, strict=True),
        (a.labels, b.labels),
        (a.weights, b.weights),
        (a.ids, b.ids),
    ]
    return a.global_count == b.global_count and all(torch.equal(x, y) for x, y in pairs)


def all_same(a: Iterable[Batch], b: Iterable[Batch]) -> bool:
    return all(same(x, y) for x, y in zip(a, b, strict=True))


def training(data: Source, **changes: Any) -> BatchLoader:
    settings: dict[str, Any] = {"global_batch_size": 6, "seed": 1} | changes
    epoch = settings.pop("epoch", 2)
    # of the package: a transform defined here would make each worker import this file and all that it imports
    loader = train_loader(data, train_transform(PRE), **settings)
    loader.set_epoch(epoch)
    return loader


def two_views(image: Image.Image, rng: np.random.Generator) -> tuple[torch.Tensor, ...]:
    return *train_transform(PRE)(image, rng), *eval_transform(PRE)(image, rng)


def test_a_batch_is_what_it_says(folder: Path) -> None:
    data = open_source(folder)
    loader = train_loader(data, two_views, global_batch_size=6, seed=1)
    loader.set_epoch(2)
    batches = list(loader)
    assert len(loader) == len(batches) == 4
    assert [batch.global_count for batch in batches] == [6, 6, 6, 5]
    first = batches[0].to("cpu")
    assert [view.shape for view in first.views] == [(6, 3, 24, 24)] * 2
    assert [view.dtype for view in first.views] == [torch.float32] * 2
    assert (first.labels.dtype, first.weights.dtype, first.ids.dtype) == (
        torch.int64,
        torch.float32,
        torch.int64,
    )
    for row, index in enumerate(first.ids.tolist()):
        rng = sample_generator(seed=1, epoch=2, sample=index)
        for view, expected in zip(first.views, two_views(decode(picture(index)), rng), strict=True):
            assert torch.equal(view[row], expected)
        assert first.labels[row] == index % 3


@pytest.mark.parametrize("kind", ["process", "thread"])
def test_pixels_and_order_do_not_depend_on_workers(folder: Path, kind: WorkerKind) -> None:
    data = open_source(folder)
    here = training(data)
    with_workers = training(data, workers=Workers(2, kind))
    for epoch in (2, 3):
        here.set_epoch(epoch)
        with_workers.set_epoch(epoch)
        expected = list(here)
        assert all_same(expected, with_workers)

    next(
        iter(with_workers)
    )  # an epoch given up, then a resume in its middle: the same workers, no left-overs
    with_workers.set_epoch(3, first_step=2)
    assert all_same(expected[2:], with_workers)
    with_workers.close()
    with_workers.set_epoch(3)
    assert all_same(expected, with_workers)


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_ranks_share_the_global_batch(folder: Path, world_size: int) -> None:
    data = open_source(folder)
    ranks = [training(data, rank=rank, world_size=world_size) for rank in range(world_size)]
    for whole, *parts in zip(training(data), *ranks, strict=True):
        for rank, part in enumerate(parts):
            real = part.weights > 0
            assert torch.equal(part.ids[real], whole.ids[rank::world_size])
            assert torch.equal(part.views[0][real], whole.views[0][rank::world_size])
        assert len({len(part.ids) for part in parts}) == 1


@pytest.mark.parametrize(("rows", "world_size"), [(4, 1), (4, 2), (30, 1), (3, 5)])
def test_evaluation_meets_each_sample_once_in_order(folder: Path, rows: int, world_size: int) -> None:
    data = open_source(folder)
    found = []
    for rank in range(world_size):
        loader = eval_loader(data, eval_transform(PRE), batch_size=rows, rank=rank, world_size=world_size)
        ids = torch.cat([batch.ids[batch.weights > 0] for batch in loader])
        assert torch.equal(ids, torch.arange(rank, 23, world_size))
        found += ids.tolist()
    assert sorted(found) == list(range(23))


def test_loading_leaves_the_global_generators_alone(folder: Path) -> None:
    data = open_source(folder)

    def states() -> list[bytes]:
        numpy_state = np.random.get_state()  # noqa: NPY002 - the global generator is what is watched
        return [
            torch.get_rng_state().numpy().tobytes(),
            pickle.dumps(numpy_state),
            repr(random.getstate()).encode(),
        ]

    before = states()
    for workers in (0, 1):
        list(training(data, workers=Workers(workers)))
    assert states() == before


def test_threads_make_few_batches_ahead_and_end_with_the_iteration() -> None:
    made: list[int] = []

    def make(plan: int) -> int:
        made.append(plan)
        return plan * plan

    found = ahead(make, iter(range(1000)), num_threads=3)
    assert [next(found) for _ in range(10)] == [n * n for n in range(10)]
    time.sleep(0.05)
    assert len(made) <= 10 + 2 * 3, "a slow consumer holds the threads up"
    found.close()  # type: ignore[attr-defined]
    assert not [t for t in threading.enumerate() if t.name.startswith("selfmask-data")]
    assert list(ahead(make, [], num_threads=2)) == []


@pytest.mark.gpu
def test_pinned_batches_arrive_unchanged(folder: Path) -> None:
    data = open_source(folder)
    for here, pinned in zip(training(data), training(data, workers=Workers(1, pin_memory=True)), strict=True):
        assert pinned.views[0].is_pinned()
        assert same(here, pinned.to("cuda", non_blocking=True).to("cpu"))


def test_a_broken_picture_is_named_with_and_without_workers(tmp_path: Path) -> None:
    members = labelled(["1", "2", "3"])
    members[3] = ("2.jpg", b"no picture")
    data = open_source(write_tar(tmp_path / "x.tar", members))
    messages = set()
    kinds: list[tuple[int, Any]] = [(0, "process"), (2, "process"), (2, "thread")]
    for workers, kind in kinds:
        loader = eval_loader(data, eval_transform(PRE), batch_size=1, workers=Workers(workers, kind))
        batches = iter(loader)
        assert next(batches).ids.tolist() == [0]
        with pytest.raises(SampleError, match=r"x\.tar: sample '2': not a picture") as caught:
            next(batches)
        messages.add(str(caught.value))
    assert len(messages) == 1


def broken_tars(path: Path) -> Source:
    members = labelled(f"{number:02d}" for number in range(12))
    members[7] = ("03.jpg", b"no picture")
    return open_source(write_tar(path / "x.tar", members))


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_broken_sample_keeps_its_slot_with_weight_0(tmp_path: Path, world_size: int) -> None:
    data = broken_tars(tmp_path)
    log = tmp_path / "run" / "quarantine.jsonl"
    seen, failed = [], 0
    for rank in range(world_size):
        quarantine = Quarantine(log, num_samples=12, budget=0.1, rank=rank)
        loader = training(data, global_batch_size=4, rank=rank, world_size=world_size, quarantine=quarantine)
        for batch in loader:
            assert torch.isfinite(batch.views[0]).all()
            assert (batch.labels >= 0).all()
            bad = batch.ids == 3
            assert (batch.weights[bad] == 0).all()
            seen += batch.ids[batch.weights > 0].tolist()
        failed += quarantine.failed
    assert sorted(seen) == [i for i in range(12) if i != 3]
    assert failed == 1
    (line,) = map(json.loads, log.read_text().splitlines())
    assert (line["id"], line["key"], line["epoch"]) == (3, "03", 2)
    assert "x.tar: sample '03': not a picture" in line["reason"]


def test_a_run_stops_above_the_budget_naming_the_keys(tmp_path: Path) -> None:
    data = broken_tars(tmp_path)
    quarantine = Quarantine(tmp_path / "q.jsonl", num_samples=12, budget=0.0)
    with pytest.raises(QuarantineError, match=r"1 samples failed .*x\.tar: sample '03'.*q\.jsonl"):
        list(training(data, quarantine=quarantine))
    # other ranks' failures count too: each rank alone is within the budget, their sum is not
    quarantine = Quarantine(tmp_path / "q.jsonl", num_samples=12, budget=0.1)
    list(training(data, quarantine=quarantine))
    quarantine.check(1)
    with pytest.raises(QuarantineError, match="2 samples failed"):
        quarantine.check(2)
    quarantine.start_epoch(3)
    assert quarantine.failed == 0


def test_a_resume_in_an_epoch_goes_on_counting_what_broke(tmp_path: Path) -> None:
    data, log = broken_tars(tmp_path), tmp_path / "q.jsonl"

    def life(first_step: int, rank: int = 0) -> Quarantine:
        quarantine = Quarantine(log, num_samples=12, budget=0.1, rank=rank)
        loader = training(data, global_batch_size=4, quarantine=quarantine)
        loader.set_epoch(2, first_step=first_step)
        list(loader)
        return quarantine

    assert life(0).failed == 1
    (line,) = map(json.loads, log.read_text().splitlines())
    # killed, and gone on before or after the step of the broken sample: it counts once
    for _ in range(2):
        assert life(line["step"]).failed == 1
    assert life(line["step"] + 1).failed == 1
    assert life(line["step"] + 1, rank=1).failed == 0, "rank 0 alone counts what was before"
    with log.open("a") as file:
        file.write(json.dumps(line | {"id": 5, "epoch": 1}) + '\n{"id": 7, "epo')
    assert life(line["step"] + 1).failed == 1, "another epoch's, and a line cut short"


def test_a_batch_of_broken_samples_only_has_the_shapes_of_others(tmp_path: Path) -> None:
    data = open_source(write_tar(tmp_path / "x.tar", [("1.cls", b"0"), ("1.jpg", b"x"), *labelled(["2"])]))
    quarantine = Quarantine(tmp_path / "q.jsonl", num_samples=2, budget=0.5)
    batches = list(training(data, global_batch_size=1, quarantine=quarantine))
    assert [batch.views[0].shape for batch in batches] == [(1, 3, 24, 24)] * 2
    assert sorted(float(batch.weights.sum()) for batch in batches) == [0, 1]


def test_state_resumes_anywhere_and_refuses_changed_data(folder: Path, tmp_path: Path) -> None:
    data = open_source(folder)
    loader = training(data)
    expected = list(loader)
    batches = iter(loader)
    next(batches), next(batches)
    state = json.loads(json.dumps(loader.state_dict()))
    assert (state["epoch"], state["step"]) == (2, 2)
    for world_size in (1, 2, 3):
        ranks = [training(data, epoch=0, rank=rank, world_size=world_size) for rank in range(world_size)]
        for rank in ranks:
            rank.load_state_dict(state)
        for whole, *parts in zip(expected[2:], *ranks, strict=True):
            ids = [i for part in parts for i in part.ids[part.weights > 0].tolist()]
            assert sorted(ids) == sorted(whole.ids.tolist())
    list(loader)
    assert (loader.state_dict()["epoch"], loader.state_dict()["step"]) == (3, 0)

    for change, message in (
        ({"seed": 9}, "seed was 9"),
        ({"global_batch_size": 8}, "global_batch_size was 8"),
    ):
        with pytest.raises(ValueError, match=message):
            training(data).load_state_dict(state | change)
    members = labelled(f"{number:03d}" for number in range(23))
    for name, changed, message in (
        ("fewer", members[:-2], "it had 23 samples and has 22"),
        ("label", [("000.cls", b"1"), *members[1:]], "its labels changed"),
        ("key", [("x.cls", b"0"), ("x.jpg", picture(0)), *members[2:]], "other keys or places"),
    ):
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / "a.tar", changed[:30])
        write_tar(tmp_path / name / "b.tar", changed[30:])
        with pytest.raises(ValueError, match=f"training data is not what it was.*{message}"):
            training(open_source(tmp_path / name)).load_state_dict(state)


KILLED_IN_AN_EPOCH = """
import multiprocessing, os, signal
from selfmask_dist.data import Workers, eval_loader, eval_transform, open_source
from selfmask_dist.common.preprocessing import Preprocessing
transform = eval_transform(Preprocessing(8, (0, 0, 0), (1, 1, 1)))
batches = iter(eval_loader(open_source(folder), transform, batch_size=1, workers=Workers(1)))
next(batches)
report.send([process.pid for process in multiprocessing.active_children()])
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_leaves_no_worker_behind(folder: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    receive, report = context.Pipe(duplex=False)
    # as source text: unpickling a function would import this file and all that it imports
    rank = context.Process(target=exec, args=(KILLED_IN_AN_EPOCH, {"folder": str(folder), "report": report}))
    rank.start()
    report.close()
    (worker,) = receive.recv()
    rank.join(20)
    assert rank.exitcode == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while Path(f"/proc/{worker}").exists():
        assert time.monotonic() < deadline, f"worker {worker} outlives its rank"
        time.sleep(0.02)


def test_an_error_in_a_transform_names_the_sample(folder: Path) -> None:
    def failing(image: Image.Image, rng: np.random.Generator) -> tuple[torch.Tensor, ...]:
        raise RuntimeError("own mistake")

    with pytest.raises(RuntimeError, match="own mistake") as caught:
        list(eval_loader(open_source(folder), failing, batch_size=2))
    assert "a.tar: sample '000'" in caught.value.__notes__[0]


def test_impossible_settings_are_refused(folder: Path) -> None:
    data = open_source(folder)
    with pytest.raises(
        ValueError, match=r"batch 6 is not divisible by world size 4; .*global_batch_size to 8"
    ):
        training(data, world_size=4)
    with pytest.raises(ValueError, match="seed is -1"):
        training(data, seed=-1)
    with pytest.raises(ValueError, match="the number of data workers is -1"):
        Workers(-1)
    with pytest.raises(ValueError, match="batch size is 0"):
        eval_loader(data, eval_transform(PRE), batch_size=0)
