"""Stores read side by side, the table of clusters on one rank, and how often stores are looked at."""

import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from selfmask_dist.cascade import Combination
from selfmask_dist.cascade import parts as parts_module
from selfmask_dist.cascade.parts import Parts, combine_to_store, gather_slices, members, write_table
from selfmask_dist.cascade.run import _wait_for
from selfmask_dist.evals.store import MAX_CHUNKS, EmbeddingStore, StoreError, chunk_size_for
from selfmask_dist.parallel import World
from selfmask_dist.runs.preempt import Preempted, StopRequest
from tests.support.distributed import run_distributed

DIM, EXPERTS = 4, 2


def fill(folder: Path, rows: int, chunk: int = 8) -> Path:
    """Stores of a dispatcher and two experts, and a table of clusters."""
    generator = torch.Generator().manual_seed(1)
    for view in range(1 + EXPERTS):
        store = EmbeddingStore.create(
            folder / str(view), num_samples=rows, dim=DIM, provenance={}, chunk_size=chunk
        )
        for c in range(store.num_chunks):
            size = len(store.chunk_range(c))
            store.write_chunk(c, torch.randn(size, DIM, generator=generator), torch.arange(size))
    np.save(folder / "clusters.npy", np.arange(rows) % EXPERTS)
    return folder


def open_parts(folder: Path) -> Parts:
    return Parts.open([folder / str(view) for view in range(1 + EXPERTS)], folder / "clusters.npy")


def test_parts_hold_what_the_stores_hold(tmp_path: Path) -> None:
    parts = open_parts(fill(tmp_path, 21))
    whole = [store.read_slice().features for store in parts.stores]
    (first, others, clusters), labels = parts.chunk(1)
    assert torch.equal(first, whole[0][8:16])
    assert all(torch.equal(found, expected[8:16]) for found, expected in zip(others, whole[1:], strict=True))
    assert clusters.tolist() == [0, 1] * 4
    assert labels.tolist() == list(range(8))
    found = [list(parts.slices(rank, 3)) for rank in range(3)]
    assert torch.equal(torch.cat([first for rank in found for first, _, _ in rank]), whole[0])
    assert torch.cat([clusters for rank in found for _, _, clusters in rank]).tolist() == [
        row % 2 for row in range(21)
    ]


def test_combining_makes_what_is_missing_whoever_makes_it(tmp_path: Path) -> None:
    parts = open_parts(fill(tmp_path, 40))
    combination = Combination.fit(parts.slices(), mode="conditional", num_experts=EXPERTS)
    stores = [
        EmbeddingStore.create(
            tmp_path / name, num_samples=40, dim=combination.output_dim, provenance={}, chunk_size=8
        )
        for name in ("alone", "shared")
    ]
    combine_to_store(combination, parts, stores[0])
    for rank in range(3):
        combine_to_store(combination, parts, stores[1], rank=rank, world_size=3)
    rows = [store.read_slice() for store in stores]
    assert torch.equal(rows[0].features, rows[1].features)
    expected = combination.transform(*parts.chunk(2)[0])
    assert torch.equal(rows[0].features[16:24], expected)


def _count_calls(folder: Path, rows: int) -> int:
    counts = [0]
    events = ("open", "os.listdir", "os.rename")
    sys.addaudithook(lambda event, _: counts.__setitem__(0, counts[0] + (event in events)))
    stat = os.stat

    def counted(*args: Any, **kwargs: Any) -> Any:
        counts[0] += 1
        return stat(*args, **kwargs)

    os.stat = counted
    parts = open_parts(folder)
    combination = Combination.fit(parts.slices(), mode="conditional_add", num_experts=EXPERTS)
    store = EmbeddingStore.create(
        folder / "new", num_samples=rows, dim=combination.output_dim, provenance={}, chunk_size=8
    )
    counts[0] = 0
    combine_to_store(combination, parts, store)
    return counts[0]


@pytest.mark.distributed
def test_calls_of_the_file_system_grow_as_the_chunks(tmp_path: Path) -> None:
    """In processes of their own, as an audit hook cannot be taken away."""
    few, many = (
        run_distributed(_count_calls, 1, fill(tmp_path / str(rows), rows), rows)[0] for rows in (80, 320)
    )
    assert few > 10 * (EXPERTS + 2), "each of ten chunks reads its stores and writes"
    assert many <= 4 * few


def test_chunks_are_a_function_of_the_data_and_few() -> None:
    assert [chunk_size_for(n, 256) for n in (1, 16_384, 33_000, 262_144, 2_700_000)] == [
        256,
        256,
        512,
        4096,
        4096,
    ]
    for rows in (10**7, 10**8, 10**9):
        size = chunk_size_for(rows, 256)
        assert size % 256 == 0
        assert MAX_CHUNKS / 2 < rows / size < 1.1 * MAX_CHUNKS


def test_a_store_whose_listing_is_old_is_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, 21)
    monkeypatch.setattr(EmbeddingStore, "_listing", lambda self: {0})
    assert len(EmbeddingStore.open(tmp_path / "0")) == 21
    (tmp_path / "0" / "00002.safetensors").unlink()
    with pytest.raises(StoreError, match=r"lacks 1 of 3 chunks, the first is 00002\.safetensors"):
        EmbeddingStore.open(tmp_path / "0")


# ---- the table of clusters


def test_members_are_the_samples_of_each_cluster_ascending(tmp_path: Path) -> None:
    table = np.random.default_rng(0).integers(0, 5, 1000).astype(np.int16)
    table[table == 3] = 2  # none has it
    for k, found in enumerate(members(table, 6)):
        assert (found == np.flatnonzero(table == k)).all()
    write_table(tmp_path / "t.npy", table)
    read = np.load(tmp_path / "t.npy")
    assert read.dtype == np.int64
    assert (read == table).all()


def _gather(total: int) -> list[int] | None:
    parts_module._WINDOW = 4
    world = World(dist.get_rank(), dist.get_world_size())
    start, stop = (total * place // world.size for place in (world.rank, world.rank + 1))
    table = gather_slices(torch.arange(start, stop).to(torch.int16), total, world)
    return None if table is None else table.tolist()


@pytest.mark.distributed
def test_the_main_rank_alone_has_the_table() -> None:
    for total in (2, 11):
        assert run_distributed(_gather, 3, total) == [list(range(total)), None, None]


# ---- waiting and looking


def _wait_here(folder: Path) -> tuple[float, int, str]:
    world = World(dist.get_rank(), dist.get_world_size())
    looks = [0]
    exists = Path.exists

    def counted(path: Path, **kwargs: Any) -> bool:
        looks[0] += 1
        return exists(path, **kwargs)

    Path.exists = counted  # type: ignore[method-assign,assignment]
    there = folder / "there"
    start = time.monotonic()
    if world.rank == 1:
        (folder / "late").unlink(missing_ok=True)
        there.touch()
    stop = StopRequest()
    if world.is_main:
        found = world.from_main(lambda: "main looked")
    else:
        found = world.from_main(lambda: "nobody asks the others")
    dist.barrier()
    if world.rank == 1:
        time.sleep(0.5)
        (folder / "late").touch()
    _wait_for([there, folder / "late"], world, stop)
    seconds = time.monotonic() - start
    stop.reason = "SIGTERM" if world.rank == 1 else ""
    with pytest.raises(Preempted):
        _wait_for([folder / "never"], world, stop)
    with pytest.raises(StoreError, match="no embedding store"):
        world.from_main(lambda: EmbeddingStore.open(folder / "none"))
    return seconds, looks[0], found


@pytest.mark.distributed
def test_one_rank_looks_for_files_and_all_hear_of_it(tmp_path: Path) -> None:
    main, other = run_distributed(_wait_here, 2, tmp_path)
    assert main[0] < 5
    assert main[1] > 0
    assert other[1] == 0, "the other rank never looks"
    assert main[2] == other[2] == "main looked"
