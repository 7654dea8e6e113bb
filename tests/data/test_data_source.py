"""The reader: every byte of every tar is accounted for, or an error names the shard and the way out."""

import json
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from selfmask_dist.data import SampleError, check_same_classes, decode, open_source, storage
from tests.support.tars import labelled, numbered_tars, picture, write_tar


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return numbered_tars(tmp_path_factory.mktemp("tars"))


def test_reads_what_was_written(folder: Path) -> None:
    data = open_source(folder)
    assert len(data) == 23
    assert data.classes == ("0", "1", "2")
    assert data.labels.dtype == np.int64
    for index in range(23):
        sample = data.read(index)
        assert (sample.data, sample.label, sample.key) == (picture(index), index % 3, f"{index:03d}")
        assert data.key(index) == sample.key
    assert len(open_source(folder / "b.tar")) == 8
    assert [open_source(folder / "[b].tar").key(index) for index in (0, 7)] == ["015", "022"]


def test_folder_layout_gives_labels_by_class_name(tmp_path: Path) -> None:
    names = ["t-shirt/1.jpg", "dress/b.c/1.jpg", "hat/1.JPEG", "hat/2.jpg"]
    tar = write_tar(tmp_path / "train.tar", [(name, picture(i)) for i, name in enumerate(names)])
    data = open_source(tar)
    assert data.classes == ("dress/b.c", "hat", "t-shirt")
    assert data.labels.tolist() == [2, 0, 1, 1]
    assert data.read(2).data == picture(2)


def test_a_split_that_lacks_classes_is_numbered_like_the_training_split(tmp_path: Path) -> None:
    train = open_source(write_tar(tmp_path / "train.tar", [(f"{c}/1.jpg", picture(0)) for c in "abc"]))
    path = write_tar(tmp_path / "test.tar", [(f"{c}/1.jpg", picture(0)) for c in "ca"])
    with pytest.raises(ValueError, match=r"test has no b.*classes=train\.classes"):
        check_same_classes(train, open_source(path))
    test = open_source(path, classes=train.classes)
    check_same_classes(train, test)
    assert test.labels.tolist() == [2, 0]
    with pytest.raises(
        ValueError, match=r"test\.tar: sample 'c/1' is of class 'c', which is not among the 2"
    ):
        open_source(path, classes=("a", "b"))


def test_json_labels_and_foreign_members(tmp_path: Path) -> None:
    members = [
        ("./LICENSE", b"text"),
        ("./README.txt", b"text"),
        ("./set/._1.jpg", b"a hidden file of another system"),
        ("./set/1.mask.png", b"no picture of its own"),
        ("./set/1.webp", picture(1, kind="WEBP")),
        ("./set/1.json", json.dumps({"label": 4, "caption": "x"}).encode()),
        (f"./set/{'long' * 60}.png", picture(2, kind="PNG")),
        (f"./set/{'long' * 60}.json", json.dumps({"label": 0}).encode()),
        ("./set/\u00fc.cls", b" 2\n"),
        ("./set/\u00fc.jpg", picture(3)),
    ]
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        data = open_source(write_tar(tmp_path / "foreign.tar", members, kind=kind))
        assert data.labels.tolist() == [4, 0, 2]
        assert [data.key(index) for index in range(3)] == ["set/1", f"set/{'long' * 60}", "set/\u00fc"]
        assert data.read(0).data == picture(1, kind="WEBP")
        assert data.read(1).data == picture(2, kind="PNG")
        assert data.classes == ("0", "1", "2", "3", "4")


def test_unlabelled_samples_are_accepted_only_on_request(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x.tar", [("1.jpg", picture(1)), ("2.jpg", picture(2))])
    with pytest.raises(ValueError, match=r"x\.tar: sample '1' has no label \(2 of 2"):
        open_source(tar)
    data = open_source(tar, require_labels=False)
    assert (data.classes, data.labels.tolist(), data.read(1).label) == ((), [-1, -1], -1)


def test_a_source_travels_by_pickle_and_keeps_few_files_open(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_MAX_OPEN_SHARDS", 1)
    data = open_source(folder)
    for index in (0, 22, 1, 21):
        assert data.read(index).data == picture(index)
    assert len(vars(data._storage)["_files"]) == 1
    copy = pickle.loads(pickle.dumps(data))
    assert vars(copy._storage)["_files"] == {}
    data.close()
    assert copy.read(22).data == data.read(22).data == picture(22)


def test_a_shard_that_changes_after_opening_is_refused(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x.tar", labelled(["1", "2"]))
    data = open_source(tar)
    write_tar(tar, labelled(["1", "2", "3"]))
    with pytest.raises(SampleError, match=r"x\.tar: sample '2'.*changed"):
        data.read(1)
    tar.unlink()
    with pytest.raises(SampleError, match=r"x\.tar: sample '2'.*No such file"):
        data.read(1)


def cut(data: bytearray, end: int) -> bytearray:
    return data[:end]


def damage(data: bytearray, at: int) -> bytearray:
    data[at] ^= 0x5A
    return data


# how to damage a tar, given where its members start and where its end mark is -> what the error says
DAMAGE: dict[str, tuple[Callable[[bytearray, list[int]], bytearray], str]] = {
    "not a tar": (lambda data, at: bytearray(b"no tar" * 1000), "not a readable tar"),
    "empty file": (lambda data, at: bytearray(), "not a readable tar"),
    "first header": (lambda data, at: damage(data, 10), "not a readable tar"),
    "later header": (lambda data, at: damage(data, at[2] + 10), r"member '1\.jpg' \(the header at byte"),
    "cut in a picture": (lambda data, at: cut(data, at[2] - 1), r"cut short after member '1\.jpg'"),
    "cut in a header": (lambda data, at: cut(data, at[2] + 100), r"cut short after member '1\.jpg'"),
    "cut between two": (lambda data, at: cut(data, at[2]), r"member '1\.jpg' \(the file ends without"),
    "cut before the end mark": (
        lambda data, at: cut(data, at[4]),
        r"member '2\.jpg' \(the file ends without",
    ),
    "joined": (lambda data, at: data + data, "more data follows"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_tar_is_an_error_that_names_it(tmp_path: Path, name: str) -> None:
    tar = write_tar(tmp_path / "x.tar", labelled(["1", "2"]))
    with tarfile.open(tar) as whole:
        starts = [info.offset for info in whole]
        starts.append(whole.offset)
    fn, message = DAMAGE[name]
    tar.write_bytes(fn(bytearray(tar.read_bytes()), starts))
    with pytest.raises(ValueError, match=rf"x\.tar: .*{message}"):
        open_source(tmp_path)


GOOD = [("9.cls", b"1"), ("9.jpg", picture(9))]
BAD_SAMPLES: dict[str, tuple[list[tuple[str, bytes]], str]] = {
    "no pictures": ([("README", b"x")], "no pictures in it"),
    "a caption alone": ([*GOOD, ("1.txt", b"x")], "'1' has a caption and no picture"),
    "an unknown file": ([*GOOD, ("1.pdf", b"%PDF")], r"'1' has a file \.pdf and no picture"),
    "no label": ([*GOOD, ("1.jpg", picture(1))], r"sample '1' has no label \(1 of 2"),
    "label no number": ([("1.cls", b"dog"), ("1.jpg", picture(1))], "sample '1' has label b'dog' in .cls"),
    "label negative": (
        [("1.jpg", picture(1)), ("1.json", b'{"label": -1}')],
        r"sample '1' has no label \(1 of 1",
    ),
    "label too large": ([*GOOD, ("1.cls", b"5"), ("1.jpg", picture(1))], "sample '1' has label 5, and there"),
    "broken json": ([("1.jpg", picture(1)), ("1.json", b"{")], r"sample '1' has a broken \.json"),
    "no picture": ([*GOOD, ("1.cls", b"0")], "sample '1' has a label and no picture"),
    "members apart": ([("1.jpg", picture(1)), *GOOD, ("1.cls", b"0")], "'1' has a label and no picture"),
    "key twice": ([*GOOD, ("1.cls", b"0"), ("1.jpg", picture(1)), *GOOD], "key '9' appears twice, apart"),
    "member twice": ([*GOOD, ("9.jpg", picture(1))], r"'9\.jpg' appears twice"),
    "two pictures": ([*GOOD, ("9.png", picture(1))], r"'9' has several pictures \(jpg, png\)"),
    "dot in a name": ([("dog/a.b.jpg", picture(1))], r"dog/a\.b\.jpg has a dot"),
    "empty picture": ([("1.cls", b"0"), ("1.jpg", b"")], "sample '1' has an empty picture"),
}


@pytest.mark.parametrize("name", BAD_SAMPLES)
def test_a_bad_sample_is_an_error_that_names_shard_and_key(tmp_path: Path, name: str) -> None:
    members, message = BAD_SAMPLES[name]
    write_tar(tmp_path / "x.tar", members)
    with pytest.raises(ValueError, match=rf"x\.tar: .*{message}"):
        open_source(tmp_path, classes=("a", "b"))


def test_links_and_compressed_tars_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        info = tarfile.TarInfo("a/1.jpg")
        info.type, info.linkname = tarfile.SYMTYPE, "a/2.jpg"
        tar.addfile(info)
    with pytest.raises(ValueError, match=r"x\.tar: member 'a/1\.jpg' is a link"):
        open_source(tmp_path)
    with tarfile.open(tmp_path / "x.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a/1.jpg"))
    with pytest.raises(ValueError, match=r"x\.tar: not a readable tar.*unpack it first"):
        open_source(tmp_path)


def test_nothing_to_open(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no \*\.tar in this folder.*selfmask data convert folder"):
        open_source(tmp_path)
    with pytest.raises(ValueError, match="no such file or folder"):
        open_source(tmp_path / "absent-*.tar")
    (tmp_path / "train").mkdir()
    write_tar(tmp_path / "train" / "x.tar", labelled("1"))
    with pytest.raises(ValueError, match="there are some in train"):
        open_source(tmp_path)


def test_the_description_beside_the_tars_is_held_against_them(folder: Path, tmp_path: Path) -> None:
    for tar in folder.glob("*.tar"):
        shutil.copy(tar, tmp_path)
    names, samples = ("a.tar", "b.tar"), (15, 8)
    shards = [
        {"name": name, "samples": count, "bytes": (tmp_path / name).stat().st_size}
        for name, count in zip(names, samples, strict=True)
    ]
    about = {"classes": ["cat", "dog", "eel"], "shards": shards}
    manifest = tmp_path / "dataset.json"
    manifest.write_text(json.dumps(about))
    assert open_source(tmp_path).classes == open_source(tmp_path / "b.tar").classes == ("cat", "dog", "eel")

    with pytest.raises(ValueError, match="numbers its 3 classes differently from the 2 asked for"):
        open_source(tmp_path, classes=("dog", "cat"))
    manifest.write_text(json.dumps({"classes": ["cat", "dog"], "shards": shards}))
    with pytest.raises(ValueError, match=r"a\.tar: sample '002' has label 2, and there are only 2 classes"):
        open_source(tmp_path)
    manifest.write_text(json.dumps(about | {"shards": shards[:1]}))
    with pytest.raises(ValueError, match=r"has b\.tar, which it does not name"):
        open_source(tmp_path)
    manifest.write_text(json.dumps(about | {"shards": [shards[0] | {"samples": 16}, shards[1]]}))
    with pytest.raises(ValueError, match=r"a\.tar: holds 15 samples, dataset\.json promises 16"):
        open_source(tmp_path)
    manifest.write_text(json.dumps(about | {"shards": [shards[0] | {"bytes": 9}, shards[1]]}))
    with pytest.raises(ValueError, match=r"a\.tar: \d+ bytes, dataset\.json promises 9"):
        open_source(tmp_path)
    manifest.write_text("[]")
    with pytest.raises(ValueError, match="not a data set's description"):
        open_source(tmp_path)
    manifest.write_text(json.dumps(about))
    (tmp_path / "b.tar").unlink()
    with pytest.raises(ValueError, match=r"lacks b\.tar"):
        open_source(tmp_path)


def test_real_tars_open(shared_data: Path) -> None:
    train = open_source(shared_data / "grocery" / "train.tar")
    assert (len(train), len(train.classes)) == (2640, 81)
    val = open_source(shared_data / "grocery" / "val.tar", classes=train.classes)
    assert (len(val), len(set(val.labels.tolist()))) == (296, 60)
    assert decode(train.read(2639).data).size[0] >= 128
