"""The embedding store: the same bytes under any number of ranks, through kills, rot and wrong use."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from selfmask_dist.common.preprocessing import Preprocessing
from selfmask_dist.data import eval_loader, eval_transform, open_source
from selfmask_dist.evals.store import EmbeddingStore, StoreError, embed_to_store
from tests.support.distributed import run_distributed
from tests.support.tars import labelled, write_tar

NUM_SAMPLES, DIM = 53, 6
PROVENANCE = {"encoder": "abc", "data": "def", "view": "dispatcher"}
TRANSFORM = eval_transform(Preprocessing(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))


@pytest.fixture
def tars(tmp_path):
    folder = tmp_path / "tars"
    folder.mkdir()
    write_tar(folder / "a.tar", labelled(f"{number:03d}" for number in range(NUM_SAMPLES)))
    return folder


def make_store(path, **changes):
    wanted = {"num_samples": NUM_SAMPLES, "dim": DIM, "provenance": PROVENANCE, "chunk_size": 8}
    return EmbeddingStore.create(path, **{**wanted, **changes})


def encoder():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 5, 2), torch.nn.Flatten(), torch.nn.Linear(8 * 6 * 6, DIM)
    )


def fill(store, tars, rank=0, world_size=1, **options):
    source = open_source(tars)
    options = {"batch_size": 4, **options}
    embed_to_store(encoder(), source, TRANSFORM, store, rank=rank, world_size=world_size, **options)


def files(path):
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def test_a_store_holds_what_the_encoder_gives_in_the_source_s_order(tmp_path, tars):
    store = make_store(tmp_path / "store")
    fill(store, tars)
    source, encode = open_source(tars), encoder()
    expected = torch.cat([encode(b.views[0]) for b in eval_loader(source, TRANSFORM, batch_size=4)])
    opened = EmbeddingStore.open(tmp_path / "store", dim=DIM, provenance={"view": "dispatcher"})
    rows = opened.read_slice()
    assert torch.equal(rows.features, expected.detach())
    assert rows.labels.tolist() == source.labels.tolist()
    assert rows.ids.tolist() == list(range(NUM_SAMPLES))
    assert len(opened) == NUM_SAMPLES


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 60])
def test_the_ranks_share_the_samples_without_gap_or_overlap(tmp_path, world_size):
    store = make_store(tmp_path / "store")
    whole = torch.randn(NUM_SAMPLES, DIM)
    for chunk in range(store.num_chunks):
        ids = list(store.chunk_range(chunk))
        store.write_chunk(chunk, whole[ids], torch.tensor(ids) % 3)
    slices = [store.read_slice(rank, world_size) for rank in range(world_size)]
    assert torch.equal(torch.cat([part.features for part in slices]), whole)
    assert torch.cat([part.ids for part in slices]).tolist() == list(range(NUM_SAMPLES))
    assert max(len(part.ids) for part in slices) - min(len(part.ids) for part in slices) <= 1
    for rank, part in enumerate(slices):
        pieces = list(store.chunks(rank, world_size))
        assert all(len(piece.ids) <= 8 for piece in pieces)
        assert [i for piece in pieces for i in piece.ids.tolist()] == part.ids.tolist()


def _fill_here(path, tars):
    rank, size = dist.get_rank(), dist.get_world_size()
    calls = []
    encoded = []

    def dist_sum(tensor):
        dist.all_reduce(tensor)
        return tensor

    encode = encoder()

    def collective_encode(images):
        encoded.append(len(images))
        dist.all_reduce(torch.zeros(1))  # hangs unless every rank encodes equally often
        return encode(images)

    embed_to_store(
        collective_encode,
        open_source(tars),
        TRANSFORM,
        make_store(path),
        batch_size=4,
        rank=rank,
        world_size=size,
        all_reduce=dist_sum,
        on_batch=lambda: calls.append(1),
    )
    return len(calls), len(encoded)


@pytest.mark.distributed
def test_stores_of_any_number_of_ranks_are_the_same_bytes(tmp_path, tars):
    fill(make_store(tmp_path / "alone"), tars)
    expected = files(tmp_path / "alone")
    assert sorted(expected) == [*(f"{chunk:05d}.safetensors" for chunk in range(7)), "manifest.json"]
    for world_size in (2, 4):
        path = tmp_path / str(world_size)
        counts = run_distributed(_fill_here, world_size, path, tars)
        assert len(set(counts)) == 1, counts
        assert counts[0][0] == counts[0][1] > 0
        assert files(path) == expected
        (path / "00003.safetensors").unlink()  # one rank has two batches to make, the others none
        assert set(run_distributed(_fill_here, world_size, path, tars)) == {(2, 2)}
        assert files(path) == expected


WORKER = """
import sys, time
from tests.evals.test_store import fill, make_store
path, tars, rank, world_size = sys.argv[1:]
fill(make_store(path), tars, int(rank), int(world_size), on_batch=lambda: time.sleep(0.1))
"""


@pytest.mark.distributed
def test_killed_at_any_moment_and_resumed_under_other_ranks_gives_the_same_bytes(tmp_path, tars):
    fill(make_store(tmp_path / "alone"), tars)
    path = tmp_path / "killed"
    with subprocess.Popen(
        [sys.executable, "-c", WORKER, str(path), str(tars), "0", "2"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        deadline = time.monotonic() + 60
        while len(list(path.glob("0*.safetensors"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    done = {file.name for file in path.glob("0*.safetensors")}
    assert 2 <= len(done) < 4, "killed in the middle of rank 0's four chunks"
    (path / ".00005.partial").write_bytes(b"half a ch")  # as a kill during a write leaves it
    before = {name: (path / name).stat().st_mtime_ns for name in done}
    with pytest.raises(StoreError, match=r"lacks \d of 7 chunks, the first is 00001"):
        EmbeddingStore.open(path)
    for rank in range(3):
        fill(make_store(path), tars, rank, 3)
    assert files(path) == files(tmp_path / "alone")
    assert before == {name: (path / name).stat().st_mtime_ns for name in done}, "finished chunks are reused"


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "other chunk", "other store"])
def test_a_damaged_chunk_is_named_and_made_again(tmp_path, tars, damage):
    path = tmp_path / "store"
    fill(make_store(path), tars)
    expected = files(path)
    victim = path / "00002.safetensors"
    data = bytearray(victim.read_bytes())
    if damage == "flip":
        data[-50] ^= 1
    elif damage == "cut":
        data = data[:-7]
    elif damage == "empty":
        data = bytearray()
    elif damage == "other chunk":
        data = bytearray((path / "00001.safetensors").read_bytes())
    else:
        other = make_store(tmp_path / "other", provenance={**PROVENANCE, "encoder": "xyz"})
        fill(other, tars)
        data = bytearray((other.path / victim.name).read_bytes())
    victim.write_bytes(data)
    with pytest.raises(StoreError, match=r"00002\.safetensors is damaged"):
        EmbeddingStore.open(path).read_slice()
    told: list[str] = []
    fill(make_store(path), tars, report=told.append)
    assert len(told) == 1
    assert "00002.safetensors" in told[0]
    assert files(path) == expected


def test_every_byte_of_a_chunk_is_covered(tmp_path):
    store = make_store(tmp_path / "store", num_samples=3, dim=2, chunk_size=4)
    store.write_chunk(0, torch.randn(3, 2), torch.tensor([1, -1, 0]))
    file = tmp_path / "store" / "00000.safetensors"
    good = file.read_bytes()
    rows = store.read_chunk(0)
    for place in range(0, len(good), 3):
        file.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
        try:
            found = store.read_chunk(0)
        except StoreError:
            continue
        # a header may say the same in other bytes; the numbers are the same then
        assert all(torch.equal(getattr(found, name), getattr(rows, name)) for name in vars(rows))


def test_another_store_is_refused_and_the_difference_named(tmp_path):
    make_store(tmp_path / "store")
    cases: list[tuple[dict, str]] = [
        ({"dim": 7}, "its dim is 6 and 7 is asked for"),
        ({"num_samples": 9}, "its num_samples is 53 and 9"),
        ({"dtype": "float16"}, "its dtype is float32 and float16"),
        ({"provenance": {**PROVENANCE, "encoder": "new"}}, "its encoder is abc and new is asked for"),
        ({"provenance": {"data": "def", "encoder": "abc"}}, "its view is dispatcher and none"),
    ]
    for change, message in cases:
        with pytest.raises(StoreError, match=message):
            make_store(tmp_path / "store", **change)
    with pytest.raises(StoreError, match="its dim is 6 and 9 is asked for"):
        EmbeddingStore.open(tmp_path / "store", dim=9)
    with pytest.raises(StoreError, match="its data is def and other"):
        EmbeddingStore.open(tmp_path / "store", provenance={"data": "other"})


def test_half_precision_halves_the_file_and_says_what_does_not_fit(tmp_path):
    store = make_store(tmp_path / "store", dtype="float16", num_samples=8, dim=256)
    features = torch.randn(8, 256)
    store.write_chunk(0, features, torch.zeros(8))
    assert torch.equal(store.read_chunk(0).features, features.half())
    assert (tmp_path / "store" / "00000.safetensors").stat().st_size < 8 * 256 * 2 + 1000
    features[5, 1] = 1e6
    with pytest.raises(StoreError, match=r"embeddings of 1 samples do not fit into float16; .* sample 5"):
        store.write_chunk(0, features, torch.zeros(8))
    features[5, 1] = torch.nan
    with pytest.raises(StoreError, match="are not finite; the first is sample 5"):
        store.write_chunk(0, features, torch.zeros(8))


def test_wrong_use_is_said(tmp_path, tars):
    with pytest.raises(StoreError, match=r"is no embedding store: it has no manifest\.json"):
        EmbeddingStore.open(tmp_path / "nothing")
    with pytest.raises(StoreError, match="dtype of float16, float32; got 53, 6, 8 and int8"):
        make_store(tmp_path / "store", dtype="int8")
    store = make_store(tmp_path / "store")
    with pytest.raises(StoreError, match="batch size 3 does not divide the store's chunk size 8"):
        fill(store, tars, batch_size=3)
    with pytest.raises(StoreError, match=r"takes features \(8, 6\) and labels \(8,\), got \(8, 5\)"):
        store.write_chunk(0, torch.zeros(8, 5), torch.zeros(8))
    with pytest.raises(StoreError, match="is of 50 samples, the source has 53"):
        fill(make_store(tmp_path / "short", num_samples=50), tars)
    manifest = tmp_path / "store" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "version": 2}))
    with pytest.raises(StoreError, match="format version 2"):
        make_store(tmp_path / "store")
    manifest.write_text("{")
    with pytest.raises(StoreError, match=r"manifest\.json cannot be read"):
        make_store(tmp_path / "store")
