"""Checkpoints that several processes write: all of it or nothing, one verdict for all, each byte by one."""

import json
import os
import signal
import time
import warnings
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor

from selfmask_dist.common.files import sha256
from selfmask_dist.parallel.parts import TensorPart, whole_parts
from selfmask_dist.runs.checkpoint import (
    CheckpointError,
    DamagedCheckpointError,
    OpenCheckpoint,
    Retention,
    Saver,
    committed,
    load_newest,
    loading_peers,
    open_newest,
    rank_file,
    read_checkpoint,
    saving,
    saving_peers,
    verify,
)
from selfmask_dist.runs.checkpoint.crc import combined_crc
from selfmask_dist.runs.checkpoint.folder import _digest
from selfmask_dist.runs.checkpoint.rank_file import Staging, own_ranges
from tests.support.distributed import DistributedError, run_distributed
from tests.support.engine_cases import world_here

SIZE = 3
NUM = 10_007  # elements of the sharded tensor; no multiple of 3


def parts_of(rank: int, step: int) -> list[TensorPart]:
    """A tensor that ranks share, two that all hold, one that differs and is of rank 0, and a short one."""
    low, high = NUM * rank // SIZE, NUM * (rank + 1) // SIZE
    number, copies = float(step), {"copies": SIZE, "copy": rank}
    first = torch.full((2,), number + rank)
    return [
        TensorPart("cut", torch.Size((NUM,)), torch.arange(low, high, dtype=torch.float32) + number, low),
        *whole_parts({"same": torch.full((700, 600), number), "count": torch.tensor(step)}, **copies),
        TensorPart("first", first.shape, first, **copies, is_of_first=True),
        TensorPart("half", torch.Size((SIZE,)), torch.full((1,), step, dtype=torch.bfloat16), rank),
    ]


def expected(step: int) -> dict[str, Tensor]:
    return {
        "cut": torch.arange(NUM, dtype=torch.float32) + float(step),
        "same": torch.full((700, 600), float(step)),
        "count": torch.tensor(step),
        "first": torch.full((2,), float(step)),
        "half": torch.full((SIZE,), step, dtype=torch.bfloat16),
    }


def check_is(step: int, tensors: dict[str, Tensor]) -> None:
    wanted = expected(step)
    assert set(tensors) == set(wanted)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in tensors.items())


def saver_of(folder: Path, said: list[str]) -> Saver:
    return Saver(folder, Retention(), peers=saving_peers(world_here()), on_failure=said.append)


def live(folder: Path) -> tuple[list[str], str | None, list[str], int]:
    """Save, fail on one rank, save again; then find the newest valid one after a rank's file was damaged."""
    world = world_here()
    said: list[str] = []
    told: list[str] = []
    saver = saver_of(folder, said)
    saver.save(parts_of(world.rank, 1), {"step": 1}, step=1)
    saver.finish()
    fsync = os.fsync
    if world.rank == 1:

        def full(fd: Any) -> None:
            raise OSError(28, "No space left on device")

        os.fsync = full
    saver.save(parts_of(world.rank, 2), {"step": 2}, step=2)
    saver.finish()
    os.fsync = fsync
    odd = [TensorPart("cut", torch.Size((2,)), torch.zeros(2, dtype=torch.complex64))]
    saver.save(odd if world.rank == 2 else parts_of(world.rank, 3), {"step": 3}, step=3)
    saver.finish()
    overlapping = parts_of(0 if world.rank == 1 else world.rank, 4)[:1]
    saver.save(overlapping, {"step": 4}, step=4)
    for step in (5, 6):  # does not wait for the one before
        saver.save(parts_of(world.rank, step), {"step": step}, step=step)
    saver.finish()
    world.barrier()
    if world.is_main:
        path = committed(folder)[0] / "rank-00002.safetensors"
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    world.barrier()
    opened = open_newest(folder, peers=loading_peers(world), report=told.append)
    assert opened is not None
    own = parts_of(world.rank, 0)
    for part in own:
        opened.read_into(part)
    for part, wanted in zip(own, parts_of(world.rank, 5), strict=True):
        if part.name != "first":
            assert torch.equal(part.tensor, wanted.tensor), part.name
    return said, opened.path.name, told, opened.bytes_read - sum(part.tensor.nbytes for part in own)


@pytest.mark.distributed
def test_ranks_commit_together_or_not_at_all_and_agree_on_what_is_valid(tmp_path: Path) -> None:
    found = run_distributed(live, SIZE, tmp_path)
    assert [name for _, name, _, _ in found] == ["step-000000005"] * SIZE
    assert [extra for *_, extra in found] == [0] * SIZE, "each rank read its own elements and no others"
    said, _, told, _ = found[0]
    assert len(said) == 3
    assert "step 2 could not be saved: [Errno 28] rank 1: No space left on device: it takes" in said[0]
    assert "step 3 could not be saved: [Errno 5] rank 2: ValueError: checkpoints hold no" in said[1]
    assert "step 4 could not be saved" in said[2]
    assert "cut: elements from 3335 on, not 0, were due" in said[2]
    assert "rank-00002.safetensors is not what was written (checksum)" in told[0]
    assert [found[rank][0] + found[rank][2] for rank in (1, 2)] == [[], []], "only the main rank reports"
    assert [path.name.partition("-2")[0] for path in tmp_path.glob("invalid-*")] == ["invalid-step-000000006"]
    checkpoint = read_checkpoint(tmp_path / "step-000000005")
    check_is(5, checkpoint.tensors)
    assert checkpoint.values == {"step": 5}
    sizes = [path.stat().st_size for path in (tmp_path / "step-000000005").glob("*.safetensors")]
    assert max(sizes) < 1.1 * min(sizes), "ranks write about as much"
    assert sum(sizes) < 1.01 * sum(tensor.nbytes for tensor in expected(5).values()) + SIZE * 1000
    first = load_file(tmp_path / "step-000000005" / "rank-00000.safetensors")
    assert torch.equal(first["cut[0:3335]"], expected(5)["cut"][:3335]), "other programs read the files"


def read_while_verifying(folder: Path) -> tuple[int, int]:
    """Save on two ranks and read at another cut: as it is, and with a byte flipped at many places.

    Return the bytes that this rank read of an undamaged one, and those of the files.
    """
    rank_file.BLOCK = saving.BLOCK = 1000
    world = world_here()
    whole, cut = torch.arange(6001.0), [0, 2777, 6001]
    low, high = cut[world.rank : world.rank + 2]
    on_both = whole_parts({"unread": torch.ones(700), "same": torch.ones(900)}, copies=2, copy=world.rank)
    saver = saver_of(folder, [])
    saver.save([TensorPart("cut", whole.shape, whole[low:high], low), *on_both], {}, step=1)
    saver.finish()
    world.barrier()

    def load(told: list[str]) -> tuple[OpenCheckpoint, int]:
        peers = loading_peers(world)
        opened = open_newest(folder, peers=peers, report=told.append, set_aside=False, verify_later=True)
        assert opened is not None
        watch = opened._watch
        assert watch is not None
        found = torch.zeros(6001)
        for low, high in ([(1234, 4100)], [(4100, 6001), (0, 1234)])[world.rank]:
            opened.read_into(TensorPart("cut", whole.shape, found[low:high], low))
            assert told or torch.equal(found[low:high], whole[low:high])
        opened.read_into(whole_parts({"same": torch.zeros(900)})[0])
        opened.confirm()
        return opened, watch.bytes_read

    opened, checked = load([])
    files = sorted(opened.path.glob("*.safetensors"))
    for file in files:
        good = file.read_bytes()
        for place in range(0, len(good), 1501):
            told = ["a byte is flipped"]
            world.barrier()
            if world.is_main:
                file.write_bytes(good[:place] + bytes([good[place] ^ 16]) + good[place + 1 :])
            world.barrier()
            with pytest.raises(DamagedCheckpointError, match=f"{file.name} is not what was written"):
                load(told)
            assert len(told) == 1 + world.is_main, "the main rank alone reports"
        world.barrier()
        if world.is_main:
            file.write_bytes(good)
        world.barrier()
    load([])
    return opened.bytes_read + checked, sum(file.stat().st_size for file in files)


@pytest.mark.distributed
def test_what_is_read_is_verified_on_the_way_and_the_rest_by_one_rank(tmp_path: Path) -> None:
    found = run_distributed(read_while_verifying, 2, tmp_path)
    assert sum(read for read, _ in found) == found[0][1] + 900 * 4, "each byte once, `same` by both"


@pytest.mark.parametrize("cut", [0, 1, 17, 4095, 5000])
def test_checksums_of_pieces_make_that_of_the_whole(cut: int) -> None:
    data = bytes(range(250)) * 20
    assert combined_crc(crc32(data[:cut]), crc32(data[cut:]), len(data) - cut) == crc32(data)


def die(folder: Path, victim: int, moment: str) -> None:
    world = world_here()
    saver = saver_of(folder, [])
    saver.save(parts_of(world.rank, 1), {"step": 1}, step=1)
    saver.finish()
    if world.rank == victim:

        def killed(*_: Any, **__: Any) -> None:
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)

        setattr(*{"write": (saving, "write_file"), "commit": (saving, "point_to")}[moment], killed)
    for step in (2, 3):
        saver.save(parts_of(world.rank, step), {"step": step}, step=step)
        saver.finish()
    (folder / f"survivor-{world.rank}-{saver.is_lost}").touch()


@pytest.mark.distributed
@pytest.mark.parametrize(("victim", "moment"), [(2, "write"), (0, "commit")])
def test_a_rank_killed_in_the_middle_of_a_save_leaves_the_older_one(
    tmp_path: Path, victim: int, moment: str
) -> None:
    with pytest.raises(DistributedError, match=f"rank {victim}"):
        run_distributed(die, SIZE, tmp_path, victim, moment)
    found = load_newest(tmp_path, report=pytest.fail)
    assert found is not None
    check_is(1, found[0].tensors)
    left = {path.name for path in tmp_path.glob("survivor-*")}
    # they know it and go on; one that has not come as far when the test ends them left nothing
    assert left <= {f"survivor-{rank}-True" for rank in range(SIZE) if rank != victim}


def test_blocks_of_a_file_are_verified_by_one_of_the_ranks_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (rank_file, saving):
        monkeypatch.setattr(module, "BLOCK", 1000)
    saver = Saver(tmp_path, Retention())
    saver.save(whole_parts({"a": torch.arange(5000.0), "b": torch.ones(3)}), {}, step=1)
    saver.finish()
    path = committed(tmp_path)[0]
    file = path / "rank-00000.safetensors"
    good = file.read_bytes()
    for index in range(0, len(good), 700):
        data = bytearray(good)
        data[index] ^= 1
        file.write_bytes(data)
        assert sum(bool(verify(path, rank=rank, size=5)) for rank in range(5)) == 1, index
        assert verify(path) == [f"{file.name} is not what was written (checksum)"]
    file.write_bytes(good + b"x")
    assert any(verify(path, rank=rank, size=5) for rank in range(5))
    file.write_bytes(good)
    assert not any(verify(path, rank=rank, size=40) for rank in range(40))


def test_every_range_of_a_tensor_is_read_from_wherever_it_lies(tmp_path: Path) -> None:
    saver = Saver(tmp_path, Retention())
    whole = torch.arange(60.0)
    cuts = [(0, 7), (7, 8), (8, 31), (31, 60)]
    parts = [TensorPart("a", torch.Size((6, 10)), whole[low:high], low) for low, high in cuts]
    saver.save([*parts, TensorPart("none", torch.Size((0, 4)), torch.zeros(0, 4))], {}, step=1)
    saver.finish()
    opened = open_newest(tmp_path)
    assert opened is not None
    for low in range(61):
        for high in range(low, 61):
            part = TensorPart("a", torch.Size((6, 10)), torch.full((high - low,), -1.0), low)
            opened.read_into(part)
            assert torch.equal(part.tensor, whole[low:high])
    # one that does not lie row by row in memory, of another dtype
    turned = torch.zeros(10, 6, dtype=torch.float64).T
    opened.read_into(TensorPart("a", torch.Size((6, 10)), turned))
    assert torch.equal(turned, whole.view(6, 10).double())
    assert opened.read("none").shape == (0, 4)
    with pytest.raises(CheckpointError, match=r"a has shape \(6, 10\) in .* and \(60,\) here"):
        opened.read_into(TensorPart("a", torch.Size((60,)), torch.zeros(60)))


def test_a_save_reuses_the_memory_of_the_one_before() -> None:
    staging = Staging()
    first = staging.fill(whole_parts({"a": torch.zeros(1000), "b": torch.zeros(10)}))
    place = first.data.data_ptr()
    assert staging.fill(whole_parts({"a": torch.zeros(900)})).data.data_ptr() == place


@pytest.mark.parametrize("copies", [1, 2, 7])
def test_what_all_hold_is_written_once_and_dealt_evenly(copies: int) -> None:
    shapes = {"large": (1700, 999), "wide": (3, 400_001), "small": (7,), "one": (), "none": (0, 3)}
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    found = [list(own_ranges(whole_parts(tensors, copies=copies, copy=copy))) for copy in range(copies)]
    for name, tensor in tensors.items():
        ranges = sorted((low, high) for own in found for part, low, high in own if part.name == name)
        assert [low for low, _ in ranges] == [0, *(high for _, high in ranges)][: len(ranges)]
        assert sum(high - low for low, high in ranges) == tensor.numel()
    loads = [sum(high - low for _, low, high in own) for own in found]
    assert max(loads) - min(loads) < 2 * rank_file._SPLIT / 4


def test_checkpoints_of_before_are_read(tmp_path: Path) -> None:
    """Format 1, as one process wrote it with torch.distributed.checkpoint."""
    path = tmp_path / "step-000000004"
    tensors = {"parameters/a": torch.randn(4, 6), "momentum/a": torch.randn(4, 6), "n": torch.tensor(3)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        writer = dcp.FileSystemWriter(path, single_file_per_rank=True, thread_count=1)
        dcp.save(dict(tensors), storage_writer=writer, no_dist=True)
    (path / "values.json").write_text(json.dumps({"step": 4}))
    files = {f.name: {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in path.iterdir()}
    manifest: dict[str, Any] = {"format": 1, "step": 4, "files": files}
    (path / "manifest.json").write_text(json.dumps({**manifest, "sha256": _digest(manifest)}))
    (tmp_path / "latest").write_text(f"{path.name}\n")
    found = load_newest(tmp_path, report=pytest.fail)
    assert found is not None
    assert found[0].values == {"step": 4}
    assert all(torch.equal(found[0].tensors[name], tensor) for name, tensor in tensors.items())
    opened = open_newest(tmp_path)
    assert isinstance(opened, OpenCheckpoint)
    part = TensorPart("momentum/a", torch.Size((4, 6)), torch.zeros(9), 7)
    opened.read_into(part)
    assert torch.equal(part.tensor, tensors["momentum/a"].reshape(-1)[7:16])
    (path / "__0_0.distcp").write_bytes(b"damaged")
    assert "__0_0.distcp has 7 bytes" in verify(path)[0]
