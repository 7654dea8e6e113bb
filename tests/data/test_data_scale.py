"""What the data costs a process does not grow with the data set: labels, subsets, orders, looks at shards."""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.data.huge_index import whole_order
from selfmask_dist.config import load_config
from selfmask_dist.data import Subset, count_labels, open_source, untrained_classes
from selfmask_dist.data.build import build_index
from selfmask_dist.data.order import (
    EpochOrder,
    SourceOrder,
    epoch_order,
    rank_batch,
)
from selfmask_dist.data.source import SampleError
from selfmask_dist.training.build import open_train
from tests.support.tars import picture, write_tar

SIZES = [
    (0, 1),
    (1, 1),
    (5, 8),
    (41, 12),
    (1500, 7),
    (5000, 48),
    (262_144 + 77, 100),
    (300_001, 1),
    (500_009, 256),
    (1_000_003, 96),
]


@pytest.mark.parametrize(("num_samples", "size"), SIZES)
def test_windows_made_lazily_are_the_order_of_before_to_the_bit(num_samples: int, size: int) -> None:
    expected = whole_order(num_samples, seed=3, epoch=5, global_batch_size=size)
    found = epoch_order(num_samples, seed=3, epoch=5, global_batch_size=size)
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == expected.dtype
    num_steps = -(-num_samples // size)
    for world_size in (world for world in (1, 2, 4) if size % world == 0):
        for step in {0, num_steps // 2, num_steps - 1} if num_steps else ():
            order = EpochOrder(num_samples, seed=3, epoch=5, global_batch_size=size)  # a resume at this step
            for rank in {0, world_size - 1}:
                place: dict[str, Any] = {
                    "epoch": 5,
                    "global_batch_size": size,
                    "rank": rank,
                    "world_size": world_size,
                }
                np.testing.assert_array_equal(
                    rank_batch(order, step, **place).ids, rank_batch(expected, step, **place).ids
                )


def test_a_rank_keeps_the_windows_that_it_stands_in() -> None:
    order = EpochOrder(100_000_000, seed=0, epoch=0, global_batch_size=256)
    for step in (0, 200_000, 390_000):
        rank_batch(order, step, epoch=0, global_batch_size=256, rank=3, world_size=8)
    made = [is_made for _, is_made in order._windows.values()]
    assert len(made) == 2
    assert all(row.tolist() == [place % 8 == 3 for place in range(64)] for row in made), "its streams alone"
    arrays = [rows for rows, _ in order._windows.values()] + [order._blocks._starts]
    assert sum(array.nbytes for array in arrays) < 8e6


def test_an_evaluation_has_no_order_in_memory() -> None:
    order = SourceOrder(10)
    batch = rank_batch(order, 2, epoch=0, global_batch_size=4, rank=1, world_size=2)
    assert (batch.ids.tolist(), batch.weights.tolist(), batch.global_count) == ([9], [1.0], 2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards of 30 pictures of three classes, with an index."""
    (tmp_path / "tars").mkdir()
    for name, first in (("a", 0), ("b", 30)):
        members = [
            member
            for n in range(first, first + 30)
            for member in ((f"{n:03d}.jpg", picture(n)), (f"{n:03d}.cls", str(n % 3).encode()))
        ]
        write_tar(tmp_path / "tars" / f"{name}.tar", members)
    build_index(tmp_path / "tars")
    return tmp_path / "tars"


def test_what_a_worker_gets_of_a_source_does_not_grow(folder: Path, tmp_path: Path) -> None:
    source = open_source(folder)
    whole = source.labels
    assert whole.tolist() == [n % 3 for n in range(60)]
    file = tmp_path / "part.npy"
    np.save(file, np.arange(59, 1, -2, dtype=np.int32))
    part = Subset.in_file(source, file)
    assert len(pickle.dumps(part)) < 2000
    copy = pickle.loads(pickle.dumps(part))
    assert copy.identity == part.identity == Subset(source, np.arange(59, 1, -2)).identity
    assert copy.labels.tolist() == whole[np.arange(59, 1, -2)].tolist()
    assert copy.labels_of(np.array([3, 0])).tolist() == whole[[53, 59]].tolist()
    assert copy.read(1) == source.read(57)
    large = tmp_path / "large.npy"
    np.save(large, np.arange(60).repeat(10_000))
    assert len(pickle.dumps(Subset.in_file(source, large))) < 2000
    np.save(file, np.arange(30))
    with pytest.raises(ValueError, match="changed while it was in use"):
        pickle.loads(pickle.dumps(part))


def test_labels_are_counted_in_parts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(folder)
    monkeypatch.setattr("selfmask_dist.data.splits._ROWS", 7)
    monkeypatch.setattr("selfmask_dist.data.indexing.labels._ROWS", 7)
    assert count_labels(source).tolist() == [0, 20, 20, 20]
    assert count_labels(Subset(source, np.array([0, 1, 3]))).tolist() == [0, 2, 1, 0]
    assert untrained_classes(Subset(source, np.array([0, 1])), source) == ("2",)
    assert open_source(folder, classes=("x", "y", "z")).labels_of(np.array([2])).tolist() == [2]
    with pytest.raises(ValueError, match=r"a\.tar: sample '002' has label 2, and there are only 2 classes"):
        open_source(folder, classes=("x", "y"))
    few = open_source(folder, classes=("x", "y"), require_labels=False)
    assert count_labels(few).tolist() == [20, 20, 20]


def test_one_process_looks_at_the_shards_and_the_others_trust_the_index(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(None, [f"data.train={folder}"])
    stats: list[str] = []
    stat = os.stat

    def counted(path: object, *args: object, **kwargs: object) -> os.stat_result:
        stats.append(str(path))
        return stat(path, *args, **kwargs)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", counted)
        patch.setenv("RANK", "1")
        source = open_train(config)
        assert not [path for path in stats if path.endswith(".tar")]
    assert source.read(0).data == picture(0)
    (folder / "b.tar").write_bytes((folder / "b.tar").read_bytes() + bytes(512))
    with pytest.raises(ValueError, match=r"b\.tar has \d+ bytes and had \d+; copy it again"):
        open_train(config)
    monkeypatch.setenv("RANK", "1")
    trusting = open_train(config)
    assert trusting.read(0).data == picture(0)
    with pytest.raises(SampleError, match=r"the shard has \d+ bytes and had \d+ when it was indexed"):
        trusting.read(45)
    (folder / "a.tar").unlink()
    with pytest.raises(SampleError, match="No such file"):
        open_train(config).read(0)


def test_a_shard_that_changes_under_a_run_is_noticed(folder: Path) -> None:
    source = open_source(folder)
    source.read(0)
    source.close()
    os.utime(folder / "a.tar", (1, 1))
    with pytest.raises(SampleError, match="changed after it was opened"):
        source.read(0)
