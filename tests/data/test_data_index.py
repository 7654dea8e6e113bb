"""The saved index: what it holds, what it costs, what it refuses, and the fourteen corruptions."""

import json
import pickle
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from benchmarks.data import corruption as data_corruption
from selfmask_dist.cli import main
from selfmask_dist.data import SampleError, open_source
from selfmask_dist.data.build import build_index, verify
from selfmask_dist.data.indexing.index import INDEX_NAME, Index, Shard, difference, load_index
from selfmask_dist.data.indexing.labels import resolve_labels
from tests.support.tars import labelled, numbered_tars, picture, write_tar


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return numbered_tars(tmp_path)


def test_the_index_reads_as_the_walk_does(folder: Path) -> None:
    walked = open_source(folder)
    built = build_index(folder)
    indexed = open_source(folder)
    assert indexed.index.has_crc32
    assert not walked.index.has_crc32
    assert built.rejects == ()
    assert len(indexed) == 23
    for i in range(23):
        assert indexed.read(i) == walked.read(i)
        assert indexed.where(i) == walked.where(i)
    assert indexed.classes == walked.classes
    assert difference(walked.identity, indexed.identity) is None, "headers alone are the same data"
    assert built.index.identity == load_index(folder / INDEX_NAME).identity


def test_a_source_with_an_index_travels_as_its_path(folder: Path) -> None:
    build_index(folder)
    data = open_source(folder)
    sent = pickle.dumps(data.index)
    assert len(sent) < 1000
    copy = pickle.loads(pickle.dumps(data))
    assert copy.read(22) == data.read(22)
    loose = pickle.loads(pickle.dumps(data.index.keep(np.arange(23) < 5, num_rejected=0)))
    assert (len(loose), loose.key(4)) == (5, "004")


def test_bits_that_rot_after_indexing_are_found_when_read(folder: Path) -> None:
    build_index(folder)
    tar = folder / "a.tar"
    data = tar.read_bytes()
    tar.write_bytes(data.replace(picture(4), picture(4)[:-3] + b"abc"))
    source = open_source(folder)
    assert source.read(3).data == picture(3)
    with pytest.raises(SampleError, match=r"a\.tar: sample '004': its bytes are not those .*crc32"):
        source.read(4)
    (line,) = verify(folder)
    assert "sample '004'" in line


def test_an_index_that_does_not_fit_its_tars_is_refused(folder: Path) -> None:
    build_index(folder)
    write_tar(folder / "b.tar", labelled(["900"]))
    (folder / "a.tar").rename(folder / "c.tar")
    with pytest.raises(
        ValueError,
        match=r"lacks a\.tar; it has c\.tar, not indexed; b\.tar has \d+ bytes and had",
    ):
        open_source(folder)
    (folder / INDEX_NAME).write_bytes((folder / INDEX_NAME).read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"samples\.index: not a readable index .*selfmask data index"):
        open_source(folder)


def test_more_rejects_than_the_budget_stop_everything(folder: Path) -> None:
    members = labelled(["900", "901"])
    members[1] = ("900.jpg", b"<html>")
    write_tar(folder / "c.tar", members)
    with pytest.raises(ValueError, match=r"1 of 25 samples .*budget of 0\.001.*c\.tar: '900' is no"):
        build_index(folder)
    assert not (folder / INDEX_NAME).exists()
    (line,) = map(json.loads, (folder / "index_rejects.jsonl").read_text().splitlines())
    assert (line["shard"], line["key"]) == ("c.tar", "900")
    built = build_index(folder, budget=0.05)
    assert built.index.num_rejected == 1
    assert [built.index.key(i) for i in (22, 23)] == ["022", "901"]
    write_tar(folder / "c.tar", labelled(["900", "901"]))
    assert build_index(folder).rejects == ()
    assert not (folder / "index_rejects.jsonl").exists(), "no stale complaints"


@pytest.mark.parametrize("name", data_corruption.CORRUPTIONS)
def test_each_corruption_is_found_named_counted_and_the_rest_delivered(tmp_path: Path, name: str) -> None:
    outcome = data_corruption.run(tmp_path, data_corruption.CORRUPTIONS[name])
    assert outcome.passes, outcome


def test_a_healthy_data_set_has_no_complaints(tmp_path: Path) -> None:
    outcome = data_corruption.run(tmp_path, data_corruption.Corruption((), ""))
    assert (outcome.found, outcome.counted, outcome.delivered) == (False, True, True)


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_tars_of_others_are_indexed(tmp_path: Path, kind: int) -> None:
    long = "d" * 60 + "/" + "n" * 80
    members = [
        ("1.JPEG", picture(1)),
        ("1.json", json.dumps({"category_id": 2}).encode()),
        (f"{long}.bmp", picture(2, kind="BMP")),
        (f"{long}.cls", b"0"),
        ("3.txt", b"a caption"),
        ("3.tif", picture(3, kind="TIFF")),
        ("3.cls", b"1"),
    ]
    write_tar(tmp_path / "x.tar", members, kind=kind)
    index = build_index(tmp_path).index
    assert [index.key(i) for i in range(3)] == ["1", long, "3"]
    assert open_source(tmp_path).labels.tolist() == [2, 0, 1]


def test_memory_and_opening_of_millions(tmp_path: Path) -> None:
    count = 200_000
    keys = np.frombuffer(b"class_name/picture-000" * count, dtype=np.uint8)
    index = Index(
        (Shard("a.tar", 1),),
        np.zeros(count, np.int32),
        np.arange(count),
        np.ones(count, np.uint32),
        np.zeros(count, np.int32),
        np.zeros(count, np.uint32),
        np.arange(1, count + 1, dtype=np.uint32) * 22,
        keys,
        ("class_name",),
        None,
        True,
    )
    index.save(tmp_path / INDEX_NAME)
    assert (tmp_path / INDEX_NAME).stat().st_size <= 56 * count
    loaded = load_index(tmp_path / INDEX_NAME)
    names, labels = resolve_labels(loaded, "x", classes=None, require_labels=True)
    assert (names, len(labels)) == (("class_name",), count)
    assert len(pickle.dumps(labels)) < 1000, "a worker maps the index, and looks labels up in it"
    assert isinstance(getattr(loaded.offset.base, "base", None), np.memmap), "mapped, not read"
    assert loaded.key(count - 1) == "class_name/picture-000"
    assert sys.getsizeof(loaded.__dict__) < 1000


def test_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "index", str(folder)]) == 0
    assert "23 samples, 0 left out" in capsys.readouterr().out
    assert main(["data", "verify", str(folder)]) == 0
    assert main(["data", "stats", str(folder)]) == 0
    assert "per class   7 (2) to 8 (0)" in capsys.readouterr().out
    data = (folder / "b.tar").read_bytes()
    (folder / "b.tar").write_bytes(data.replace(picture(20), picture(20)[:-3] + b"abc"))
    assert main(["data", "verify", str(folder)]) == 1
    assert "sample '020'" in capsys.readouterr().out
    assert main(["data", "index", str(folder / "absent")]) == 2
