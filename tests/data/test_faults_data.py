"""What a user's tars hold and nobody foresaw: it is used, or it is named, listed and counted."""

import io
import json
import os
import time
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from selfmask_dist.common.class_names import normal_name, similar_names
from selfmask_dist.common.pictures import MAX_ASPECT, ShapeError, kind_of
from selfmask_dist.common.preprocessing import Preprocessing
from selfmask_dist.config import load_config
from selfmask_dist.data import (
    Quarantine,
    Subset,
    decode,
    eval_transform,
    notes_on_splits,
    open_source,
    shared_samples,
    train_loader,
    train_transform,
    untrained_classes,
)
from selfmask_dist.data.build import build_index
from selfmask_dist.data.indexing.labels import ForeignLabelsWarning
from selfmask_dist.data.indexing.patterns import expand
from tests.support.tars import labelled, picture, write_tar

PRE = Preprocessing(24, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))


def saved(values: np.ndarray, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, kind, **options)
    return buffer.getvalue()


# ---- what is in a tar and is not used


def test_pictures_are_taken_by_content_whatever_they_are_called(tmp_path: Path) -> None:
    kinds = [("cat/1", "JPEG"), ("cat/2.JPE", "JPEG"), ("cat/3.img", "PNG"), ("dog/4.jfif", "JPEG")]
    kinds += [("dog/5.AVIF", "AVIF"), ("owl/6", "TIFF"), ("owl/7.dat", "GIF"), ("owl/8.pic", "BMP")]
    write_tar(tmp_path / "x.tar", [(name, picture(n, kind=kind)) for n, (name, kind) in enumerate(kinds)])
    walked = open_source(tmp_path / "x.tar")
    built = build_index(tmp_path / "x.tar")
    assert built.rejects == ()
    for source in (walked, open_source(tmp_path / "x.tar")):
        assert source.classes == ("cat", "dog", "owl")
        assert [source.read(n).data for n in range(8)] == [
            picture(n, kind=k) for n, (_, k) in enumerate(kinds)
        ]


def test_what_is_not_used_is_listed_with_its_reason_and_counted(tmp_path: Path) -> None:
    members = [
        ("__MACOSX/cat/1.jpg", b"x"),
        ("cat/.DS_Store", b"x"),
        ("cat/1.jpg", picture(1)),
        ("cat/1.xml", b"<box/>"),
        ("cat/2.heic", b"\0\0\0\x18ftypheic" + bytes(100)),
        ("cat/3.txt", b"a caption whose picture was never fetched"),
        ("cat/Thumbs.db", b"x"),
        ("cow/4.pdf", b"%PDF-1.4"),
        ("dog/5.jpg", picture(5)),
        ("README.md", b"about"),
    ]
    write_tar(tmp_path / "x.tar", members)
    with pytest.raises(ValueError, match=r"3 of 5 samples .*'cat/2' has a file \.heic and no picture"):
        build_index(tmp_path)
    built = build_index(tmp_path, budget=0.6)
    lost = {reject.key: reject.reason for reject in built.rejects if reject.is_lost}
    assert set(lost) == {"cat/2", "cat/3", "cow/4"}
    assert "a caption and no picture" in lost["cat/3"]
    notes = [f"{reject.key} {reject.reason}" for reject in built.rejects if not reject.is_lost]
    assert any("4 hidden files" in note and "Thumbs.db" in note for note in notes)
    assert any("not read: 1 .xml" in note for note in notes)
    assert any(note.startswith("cow is a class of which no picture") for note in notes)
    assert built.index.num_rejected == 3
    with pytest.raises(ValueError, match=r"x\.tar: sample 'cat/2' has a file .*selfmask data index"):
        open_source(tmp_path / "x.tar")


# ---- labels


@pytest.mark.parametrize("member", [("cls", b"-1"), ("cls", b" -100\n"), ("json", b'{"label": -1}')])
def test_a_negative_label_is_none(tmp_path: Path, member: tuple[str, bytes]) -> None:
    members = [*labelled(["1", "2"]), (f"3.{member[0]}", member[1]), ("3.jpg", picture(3))]
    write_tar(tmp_path / "x.tar", members)
    with pytest.raises(ValueError, match=r"'3' has no label \(1 of 3"):
        open_source(tmp_path / "x.tar")
    assert open_source(tmp_path / "x.tar", require_labels=False).labels.tolist() == [0, 1, -1]


@pytest.mark.parametrize(
    "member",
    [("json", b'{"label": "dog"}'), ("json", b"{cut"), ("cls", b"n01440764"), ("json", b'{"cls": 1.5}')],
)
def test_labels_that_nobody_asked_for_are_not_judged(tmp_path: Path, member: tuple[str, bytes]) -> None:
    tar = write_tar(tmp_path / "x.tar", [("1.jpg", picture(1)), (f"1.{member[0]}", member[1])])
    with pytest.raises(ValueError, match=r"'1' has (label|a broken)"):
        open_source(tar)
    assert open_source(tar, require_labels=False).labels.tolist() == [-1]
    assert len(build_index(tar, require_labels=False).index) == 1


def test_labels_outside_of_the_classes_are_none_where_none_are_needed(tmp_path: Path) -> None:
    numbered = write_tar(tmp_path / "n.tar", labelled(["1", "2", "3"]))
    assert open_source(numbered, classes=("a", "b"), require_labels=False).labels.tolist() == [0, 1, -1]
    folders = write_tar(tmp_path / "f.tar", [("Dog/1.jpg", picture(1)), ("dog/2.jpg", picture(2))])
    assert open_source(folders, classes=("dog",), require_labels=False).labels.tolist() == [-1, 0]
    build_index(numbered, classes=("a", "b"), require_labels=False)
    (tmp_path / "dataset.json").write_text('{"classes": ["x", "y", "z"], "shards": []}')
    numbered.with_name("n.tar.index").unlink()
    with pytest.warns(ForeignLabelsWarning, match="numbers its 3 classes differently"):
        assert open_source(numbered, classes=("a",), require_labels=False).labels.tolist() == [-1] * 3


# ---- names of classes


def test_one_name_in_two_unicode_forms_is_one_class(tmp_path: Path) -> None:
    nfc, nfd = (unicodedata.normalize(form, "Bärenklau") for form in ("NFC", "NFD"))
    train = write_tar(tmp_path / "train.tar", [(f"{nfd}/1.jpg", picture(1)), ("Ulme/2.jpg", picture(2))])
    test = write_tar(tmp_path / "test.tar", [(f" {nfc} /3.jpg", picture(3))])
    source = open_source(train)
    assert source.classes == (nfc, "Ulme")
    assert open_source(test, classes=source.classes).labels.tolist() == [0]


@pytest.mark.parametrize("names", [("Husky", "husky"), ("ﬁr", "fir"), ("pear\u200b", "pear"), ("1", "01")])
def test_classes_that_look_like_one_are_refused_until_told(tmp_path: Path, names: tuple[str, str]) -> None:
    members = [(f"{names[0]}/1.jpg", picture(1)), *((f"{names[1]}/{n}.jpg", picture(n)) for n in (2, 3))]
    tar = write_tar(tmp_path / "x.tar", [*members, ("zebra/4.jpg", picture(4))])
    for open_it in (open_source, build_index):
        with pytest.raises(ValueError, match=r"look like one class .*--similar-classes merge, or keep"):
            open_it(tar)
    assert build_index(tar, similar="merge").index.folders == tuple(sorted([names[1], "zebra"]))
    assert build_index(tar, similar="keep").index.folders == tuple(sorted([*names, "zebra"]))
    assert len(open_source(tar)) == 4, "the index remembers what was told"
    assert similar_names(["a", "b", "10", "1.5"]) == []
    assert normal_name(" a / b ") == "a/b"


def test_a_test_class_without_training_pictures_and_shared_pictures_are_told(tmp_path: Path) -> None:
    train_tar = write_tar(tmp_path / "train.tar", [("a/1.jpg", picture(1)), ("b/2.jpg", picture(2))])
    test_tar = write_tar(tmp_path / "test.tar", [("a/9.jpg", picture(2)), ("b/8.jpg", picture(8))])
    build_index(train_tar), build_index(test_tar)
    train = open_source(train_tar)
    test = open_source(test_tar, classes=train.classes)
    assert untrained_classes(train, test) == ()
    assert shared_samples(train, test).tolist() == [0]
    (note,) = notes_on_splits(train, test)
    assert "1 of 2 test images are training images too" in note
    assert "'a/9'" in note
    only_a = Subset(train, np.array([0]))
    assert untrained_classes(only_a, test) == ("b",)
    (note,) = notes_on_splits(only_a, test)
    assert "1 of 2 classes, with 1 of 2 test images, have no training image: b" in note
    assert notes_on_splits(train, train) == [], "the same source twice is meant"
    both = write_tar(tmp_path / "both.tar", [("a/1.jpg", picture(1)), ("b/2.jpg", picture(1))])
    (reject,) = build_index(both).rejects
    assert "1 pictures are there under several labels" in reject.reason
    assert not reject.is_lost


# ---- shapes and pixels


@pytest.mark.parametrize("size", [(1, 4000), (9000, 3), (2, 2 * MAX_ASPECT + 1)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_thin_pictures_are_refused_before_any_work(size: tuple[int, int], kind: str, tmp_path: Path) -> None:
    data = picture(1, size=size, kind=kind)
    start = time.process_time()
    with pytest.raises(ShapeError, match=rf"is {size[0]} x {size[1]} pixels; its sides may differ 100 times"):
        train_transform(PRE)(decode(data), np.random.default_rng(0))
    for crop_mode in ("center", "squash"):
        transform = eval_transform(Preprocessing(224, PRE.mean, PRE.std, "bicubic", 0.9, crop_mode))
        with pytest.raises(ShapeError):
            transform(Image.new("RGB", size), np.random.default_rng(0))
    assert time.process_time() - start < 1
    write_tar(tmp_path / "x.tar", [*labelled(["1"]), ("2.cls", b"0"), ("2.jpg", data)])
    for decode_check in (True, False):
        built = build_index(tmp_path, decode_check=decode_check, budget=0.5)
        assert any(reject.key == "2" and "sides may differ" in reject.reason for reject in built.rejects)
        assert len(built.index) == 1


def test_the_resized_picture_is_bounded_too_and_training_goes_on(tmp_path: Path) -> None:
    huge = eval_transform(Preprocessing(4000, PRE.mean, PRE.std))
    with pytest.raises(ShapeError, match="would be resized to 4571 x "):
        huge(Image.new("RGB", (10, 900)), np.random.default_rng(0))
    panorama = eval_transform(PRE)(Image.new("RGB", (2000, 40)), np.random.default_rng(0))
    assert panorama[0].shape == (3, 24, 24)
    tar = write_tar(
        tmp_path / "x.tar",
        [*labelled(["1", "2"]), ("3.cls", b"0"), ("3.png", picture(3, size=(1, 999), kind="PNG"))],
    )
    quarantine = Quarantine(tmp_path / "q.jsonl", num_samples=3, budget=0.4)
    loader = train_loader(
        open_source(tar), eval_transform(PRE), global_batch_size=3, seed=0, quarantine=quarantine
    )
    (batch,) = loader
    assert batch.weights.sum() == 2
    (line,) = map(json.loads, (tmp_path / "q.jsonl").read_text().splitlines())
    assert (line["key"], "is 1 x 999 pixels" in line["reason"]) == ("3", True)


RAMP = np.tile(np.linspace(0, 1, 256), (4, 1))


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ((RAMP * 65535).astype(np.uint16), "PNG"),
        ((RAMP * 65535).astype(np.uint16), "TIFF"),
        ((RAMP * 65535).astype(">u2"), "TIFF"),
        ((RAMP * (2**31 - 1)).astype(np.int32), "TIFF"),
        (RAMP.astype(np.float32), "TIFF"),
    ],
)
def test_deep_pixels_scale_by_the_range_of_their_type(values: np.ndarray, kind: str) -> None:
    found = np.asarray(decode(saved(values, kind)))
    assert found.shape == (4, 256, 3)
    assert np.abs(found[0, :, 0].astype(int) - np.arange(256)).max() <= 1
    assert (found == found[..., :1]).all()


def test_a_16_bit_pgm_scales_as_well() -> None:
    data = b"P5 256 1 65535\n" + (np.arange(256) * 257).astype(">u2").tobytes()
    assert np.abs(np.asarray(decode(data))[0, :, 0].astype(int) - np.arange(256)).max() <= 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((RAMP * 255).astype(np.float32), "floats, from 0 to 255"),
        ((RAMP - 0.5).astype(np.float32), r"floats, from -0\.5 to 0\.5"),
        (np.where(RAMP > 0.5, np.nan, RAMP).astype(np.float32), "floats, from nan"),
        (np.where(RAMP > 0.5, np.inf, RAMP).astype(np.float32), "floats, from 0 to inf"),
        ((RAMP * 255).astype(np.int32), "32 bits of which the largest is 255: it would be black"),
        ((RAMP * 9 - 5).astype(np.int32), r"negative \(-5\)"),
    ],
)
def test_pixels_without_a_known_scale_are_refused_by_name(
    values: np.ndarray, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"has pixels .*{message}"):
        decode(saved(values, "TIFF"))
    write_tar(tmp_path / "x.tar", [*labelled(["1"]), ("2.cls", b"0"), ("2.tif", saved(values, "TIFF"))])
    (reject,) = build_index(tmp_path, budget=0.5).rejects
    assert (reject.key, reject.is_lost) == ("2", True)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK", "RGBA", "YCbCr"])
def test_other_modes_keep_their_grey(mode: str) -> None:
    grey = Image.fromarray(np.repeat(np.repeat(np.array([[0, 255]], np.uint8), 8, 0), 8, 1)).convert("RGB")
    buffer = io.BytesIO()
    grey.convert("L").convert(mode) if mode in ("1", "LA") else None
    source = grey.convert("L").convert(mode) if mode in ("1", "LA") else grey.convert(mode)
    source.save(buffer, "TIFF")
    found = np.asarray(decode(buffer.getvalue())).astype(int)
    assert found[:, :7].max() <= 2
    assert found[:, 9:].min() >= 253


def test_what_is_no_picture_is_not_taken_for_one() -> None:
    assert kind_of(b"RIFF\0\0\0\0WAVEfmt ") is None
    assert kind_of(b"BM is how this text begins") is None
    assert kind_of(b"%!PS-Adobe-3.0 EPSF-3.0\n") is None
    assert kind_of(b"") is None
    with pytest.raises(ValueError, match="EPS inside, a drawing"):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\n")


# ---- paths


def test_braces_globs_and_lists_name_tars(tmp_path: Path) -> None:
    for n in range(3):
        write_tar(tmp_path / f"a-{n:06d}.tar", labelled([f"{n}0", f"{n}1"]))
    (tmp_path / "more").mkdir()
    write_tar(tmp_path / "more" / "b.tar", labelled(["90"]))
    start = str(tmp_path)
    for path, count in (
        (f"{start}/a-{{000000..000002}}.tar", 6),
        (f"{start}/a-00000{{0,2}}.tar", 4),
        (f"{start}/{{a-*,more/b}}.tar", 7),
        ([tmp_path / "a-000000.tar", tmp_path / "more"], 3),
        (f"{start}/a-000001.tar::{start}/more/*.tar", 3),
    ):
        assert len(open_source(path)) == count, path
    with pytest.raises(ValueError, match=r"a-000003\.tar: no such file .*stands for 3 paths, 1 are absent"):
        open_source(f"{start}/a-{{000001..000003}}.tar")
    with pytest.raises(ValueError, match=r"names .*a-000000\.tar more than once"):
        open_source([f"{start}/a-000000.tar", f"{start}/a-*.tar"])
    with pytest.raises(ValueError, match="list of paths is empty"):
        open_source([])
    with pytest.raises(ValueError, match=r"name one folder, which holds their index"):
        open_source("s3://bucket/{a,b}/0.tar")
    assert expand("x-{08..11}{a,b}") == [f"x-{n:02d}{c}" for n in range(8, 12) for c in "ab"]
    assert expand("x-{4..0..2}") == ["x-4", "x-2", "x-0"]
    assert expand("{plain}") == ["{plain}"]
    config = load_config(None, [f"data.train=[{start}/a-000000.tar, {start}/more]"])
    assert config.data.train is not None
    assert len(open_source(config.data.train)) == 3


def test_a_shard_that_is_a_dead_link_or_a_pipe_is_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", labelled(["1"]))
    os.symlink("/nonexistent/b.tar", tmp_path / "b.tar")
    for open_it in (open_source, build_index):
        with pytest.raises(ValueError, match=r"b\.tar: a link to /nonexistent/b\.tar, which is absent"):
            open_it(tmp_path)
    (tmp_path / "b.tar").unlink()
    os.mkfifo(tmp_path / "b.tar")
    with pytest.raises(ValueError, match=r"b\.tar: no regular file"):
        open_source(tmp_path)
    (tmp_path / "b.tar").unlink()
    (tmp_path / "elsewhere").mkdir()
    write_tar(tmp_path / "elsewhere" / "c.tar", labelled(["2"]))
    os.symlink(tmp_path / "elsewhere" / "c.tar", tmp_path / "c.tar")
    assert len(open_source(tmp_path)) == 2
