"""What people keep in folders and lists and nobody foresaw: read for what it is, or named with a way out."""

import json
import os
import tarfile
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep import csv_manifest, image_folder
from data_prep.csv_manifest import convert_csv
from data_prep.image_folder import convert_image_folder
from data_prep.inaturalist import convert_inaturalist
from data_prep.shards import Conversion
from data_prep.sun397 import convert_sun397
from data_prep.torchvision_dataset import convert_torchvision
from selfmask_dist.data import open_source
from selfmask_dist.data.build import build_index
from tests.support.published_trees import inat, save, sun
from tests.support.tars import picture


def folders(src: Path, out: Path, **options: Any) -> list[Conversion]:
    return convert_image_folder(src, out, progress=False, **options)


def fill(root: Path, *names: str, start: int = 0) -> None:
    for number, name in enumerate(names, start):
        save(root / name, number)


# ---- splits


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (("TRAIN", "Validation"), {"train", "val"}),
        (("training", "Dev", "testing"), {"train", "val", "test"}),
        (("Train ", "VALID"), {"train", "val"}),
    ],
)
def test_splits_are_known_by_their_usual_names(
    names: tuple[str, ...], splits: set[str], tmp_path: Path
) -> None:
    for number, name in enumerate(names):
        fill(tmp_path / "src" / name, "elm/1.jpg", "oak/2.jpg", start=10 * number)
    done = folders(tmp_path / "src", tmp_path / "out")
    assert {one.folder.name for one in done} == splits
    assert {one.classes for one in done} == {("elm", "oak")}
    assert folders(tmp_path / "src", tmp_path / "one", split=names[1].strip())[0].num_samples == 2


AMBIGUOUS = {
    "a split beside classes": (("train/elm/1.jpg", "oak/2.jpg"), "splits .train. and other folders .oak"),
    "a class called Test, deep": (("Test/a/1.jpg", "Control/b/2.jpg"), "splits .Test. and other folders"),
    "two names of one split": (
        ("val/elm/1.jpg", "validation/elm/2.jpg"),
        "val and validation, which are names",
    ),
    "splits without classes": (
        ("train/1.jpg", "test/2.jpg"),
        "test, train, called like splits, with pictures",
    ),
    "splits inside of classes": (
        ("elm/train/1.jpg", "elm/test/2.jpg", "oak/3.jpg"),
        "folders that hold splits",
    ),
    "a folder around it all": (
        ("data/Training/elm/1.jpg", "data/Test/elm/2.jpg"),
        "folders that hold splits",
    ),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_a_tree_that_reads_in_two_ways_is_shown_and_asked_about(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths, message = AMBIGUOUS[name]
    src = tmp_path / "src"
    fill(src, *paths)
    with pytest.raises(
        ValueError, match=rf"{message}(.|\n)*--layout splits or --layout classes(.|\n)*src/\n"
    ):
        folders(src, tmp_path / "out")
    top = {path.split("/")[0] for path in paths}
    assert image_folder.main([str(src), str(tmp_path / "out"), "--layout", "classes"]) == 0
    assert set(open_source(tmp_path / "out").classes) == top
    capsys.readouterr()


def test_what_is_told_of_the_layout_is_done_and_noted(tmp_path: Path) -> None:
    fill(tmp_path / "src", "train/elm/1.jpg", "extra/elm/2.jpg", "val/elm/3.jpg", "Validation/elm/4.jpg")
    done = folders(tmp_path / "src", tmp_path / "out", layout="splits")
    assert {one.folder.name for one in done} == {"train", "val", "validation"}
    assert all(any("no splits are left out (extra)" in note for note in one.notes) for one in done)
    fill(tmp_path / "classes", "plane/1.jpg", "Train/2.jpg")
    (one,) = folders(tmp_path / "classes", tmp_path / "two")
    assert one.classes == ("Train", "plane")
    assert any(note.startswith("Train: a class, as pictures lie in it directly") for note in one.notes)
    with pytest.raises(ValueError, match=r"no folder that is called like a split"):
        folders(tmp_path / "src" / "train", tmp_path / "three", layout="splits")


# ---- names and what splits share


def test_classes_that_look_like_one_are_joined_or_kept_when_told(tmp_path: Path) -> None:
    nfc, nfd = (unicodedata.normalize(form, "Öl") for form in ("NFC", "NFD"))
    fill(tmp_path / "src", f"train/{nfd}/1.jpg", "train/Elm/2.jpg", f"test/{nfc}/3.jpg", "test/ELM/4.jpg")
    with pytest.raises(ValueError, match=r"look like one \('ELM' and 'Elm'\).*--similar-classes"):
        folders(tmp_path / "src", tmp_path / "out")
    merged = folders(tmp_path / "src", tmp_path / "merge", similar_classes="merge")
    assert {one.classes for one in merged} == {("Elm", nfc)}
    assert any("one Unicode form" in note for note in merged[0].notes)
    kept = folders(tmp_path / "src", tmp_path / "keep", similar_classes="keep")
    assert {one.classes for one in kept} == {("ELM", "Elm", nfc)}
    (test,) = [one for one in kept if one.folder.name == "test"]
    assert any(
        "1 of 2 classes, with 1 pictures, have none in the training split: ELM" in n for n in test.notes
    )


def test_the_same_bytes_under_two_labels_and_in_two_splits_are_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path / "src", "train/elm/1.jpg", "train/oak/2.jpg", "train/oak/3.jpg")
    for name in ("train/oak/9.jpg", "test/oak/7.jpg", "test/elm/8.jpg"):
        save(tmp_path / "src" / name, 0)
    assert image_folder.main([str(tmp_path / "src"), str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert "note: 1 pictures are there under several labels" in told
    assert "train/elm/1.jpg (elm) and train/oak/9.jpg (oak)" in told or "train/oak/9.jpg (oak) and" in told
    assert "note: 2 of 2 pictures are in train too, byte for byte, 1 of them under another label" in told


def test_lists_in_the_forms_that_programs_write(tmp_path: Path) -> None:
    fill(tmp_path / "img", "a/0.jpg", "a/1.jpg", "b/2.jpg")
    rows = [
        ("a/0.jpg", "x", "Training"),
        ("./a/1.jpg", " y ", "training"),
        (str(tmp_path / "img/b/2.jpg"), "x", "Val"),
    ]
    table = tmp_path / "l.csv"
    for number, (head, sign, encoding) in enumerate(
        [
            ("Filename;Class;Set", ";", "utf-8-sig"),
            ("image_path\tcategory\tsubset", "\t", "utf-16"),
            (" path , label , split ", ",", "utf-8"),
        ]
    ):
        table.write_text("\r\n".join([head, *(sign.join(row) for row in rows)]) + "\r\n", encoding=encoding)
        done = convert_csv(table, tmp_path / "img", tmp_path / str(number), progress=False)
        assert {one.folder.name: one.num_samples for one in done} == {"train": 2, "val": 1}
        assert done[0].classes == ("x", "y")
    table.write_text("file,image,label\na/0.jpg,a/1.jpg,x\n")
    with pytest.raises(ValueError, match=r"'file' and 'image' may both be the path; .*--path-column"):
        convert_csv(table, tmp_path / "img", tmp_path / "o", progress=False)
    arguments = [str(table), str(tmp_path / "img"), str(tmp_path / "o"), "--path-column", "image"]
    assert csv_manifest.main(arguments) == 0
    assert [open_source(tmp_path / "o/train").key(0)] == ["a/1"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ["0.jpg,cat", "./0.jpg,dog"],
            r"1 pictures are listed under two classes \(0\.jpg as 'cat' and as 'dog'",
        ),
        (["0.jpg,cat", "1.jpg,CAT"], "look like one .'CAT' and 'cat'"),
        (["0.jpg,7", "1.jpg,7.0"], "look like one .'7' and '7.0'"),
        (["0.jpg,cat", "1.jpg,nan"], "line 3: a field is empty .*-1 says"),
        (["0.jpg,cat", "1.jpg, "], "line 3: a field is empty"),
        (["/elsewhere/0.jpg,cat"], "leads out of the image folder"),
    ],
)
def test_lists_that_contradict_themselves_are_refused(lines: list[str], message: str, tmp_path: Path) -> None:
    fill(tmp_path / "img", "0.jpg", "1.jpg")
    (tmp_path / "l.csv").write_text("\n".join(["path,label", *lines]) + "\n")
    with pytest.raises(ValueError, match=message):
        convert_csv(tmp_path / "l.csv", tmp_path / "img", tmp_path / "out", progress=False)


def test_repeated_lines_unlabelled_ones_and_unicode_forms_of_paths(tmp_path: Path) -> None:
    nfc, nfd = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    fill(tmp_path / "img", f"{nfd}.jpg", "1.jpg", "2.jpg")
    lines = [f"{nfc}.jpg,cat", "1.jpg,dog", "1.jpg,dog", "2.jpg,-1"]
    (tmp_path / "l.csv").write_text("\n".join(["path,label", *lines]) + "\n")
    (one,) = convert_csv(tmp_path / "l.csv", tmp_path / "img", tmp_path / "out", progress=False)
    assert (one.num_samples, one.classes) == (3, ("cat", "dog"))
    assert any("1 lines list a picture again" in note for note in one.notes)
    assert any("1 of 3 pictures have no label" in note for note in one.notes)
    assert sorted(open_source(one.folder, require_labels=False).labels.tolist()) == [-1, 0, 1]
    about = json.loads((one.folder / "dataset.json").read_text())
    assert (about["num_samples"], about["samples_per_class"]) == (3, {"cat": 1, "dog": 1})


def test_published_lists_are_read_in_any_unicode_form_and_told_when_they_contradict(tmp_path: Path) -> None:
    train = inat(tmp_path / "inat", 2021, "train")
    values = json.loads(train.read_text())
    values["annotations"].append({"id": 99, "image_id": 999, "category_id": 0})
    values["images"].append(values["images"][0])
    values["categories"][1]["name"] = " Rosa canina "
    train.write_bytes(b"\xef\xbb\xbf" + json.dumps(values).encode())
    (one,) = convert_inaturalist(tmp_path / "inat", tmp_path / "a", train=train, progress=False)
    assert (one.num_samples, one.classes[1]) == (9, "00001_Rosa canina")
    assert any("1 annotations are of images that are not listed (999)" in note for note in one.notes)
    values["categories"].append({"id": 0, "name": "Sterna"})
    train.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="category 0 has two names"):
        convert_inaturalist(tmp_path / "inat", tmp_path / "b", train=train, progress=False)

    sun(tmp_path / "sun")
    lists = tmp_path / "sun" / "Testing_02.txt"
    lists.write_bytes(b"\xef\xbb\xbf" + lists.read_bytes().replace(b"/a/abbey/", b"\\a\\abbey\\"))
    test = convert_sun397(tmp_path / "sun", tmp_path / "c", partition=2, progress=False)[1]
    assert test.num_samples == 3
    lists.write_text(lists.read_text(encoding="utf-8-sig") + "/a/abbey/sun_00.jpg\n")
    test = convert_sun397(tmp_path / "sun", tmp_path / "d", partition=2, progress=False)[1]
    assert any("1 of 4 pictures are in train too" in note for note in test.notes)


def test_a_torchvision_label_below_0_is_none_and_one_above_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision import datasets  # type: ignore[import-untyped]

    class Half:
        classes = ("cat", "dog")

        def __init__(self, root: str, split: str) -> None:
            labels: dict[str, list[Any]] = {"train": [0, -1, 1], "test": [1, 2], "odd": ["a"]}
            self.labels = labels[split]

        def __getitem__(self, index: int) -> tuple[Image.Image, int]:
            return Image.fromarray(np.full((8, 8, 3), 9 * index, np.uint8)), self.labels[index]

    monkeypatch.setattr(datasets, "Half", Half, raising=False)
    (one,) = convert_torchvision("Half", tmp_path, tmp_path / "out", splits=["train"], progress=False)
    assert sorted(open_source(one.folder, require_labels=False).labels.tolist()) == [-1, 0, 1]
    with pytest.raises(ValueError, match="split test: label 2, and there are only 2 classes"):
        convert_torchvision("Half", tmp_path, tmp_path / "two", splits=["test"], progress=False)
    with pytest.raises(ValueError, match="split odd: its labels are no class numbers"):
        convert_torchvision("Half", tmp_path, tmp_path / "two", splits=["odd"], progress=False)


# ---- files


def test_every_picture_is_taken_by_content_and_noise_is_counted(tmp_path: Path) -> None:
    src = tmp_path / "src"
    kinds = {
        "a/1": "JPEG",
        "a/2.AVIF": "AVIF",
        "a/3.jpe": "JPEG",
        "b/4.TIF": "TIFF",
        "b/5.bmp": "BMP",
        "b/6.x": "PNG",
    }
    for number, (name, kind) in enumerate(kinds.items()):
        (src / name).parent.mkdir(parents=True, exist_ok=True)
        (src / name).write_bytes(picture(number, kind=kind))
    for name in ("a/Thumbs.db", "a/.DS_Store", "b/__MACOSX/4.TIF", "LICENSE"):
        (src / name).parent.mkdir(exist_ok=True)
        (src / name).write_bytes(b"x")
    (one,) = folders(src, tmp_path / "out")
    assert (one.num_samples, one.num_rejected) == (6, 0)
    assert {note.partition(" (")[0] for note in one.notes} == {
        "1 files outside of class folders are left out",
        "a: 2 hidden files or folders, or those of a system, are left out",
        "b: 1 hidden files or folders, or those of a system, are left out",
    }
    assert build_index(one.folder).rejects == ()
    source = open_source(one.folder)
    assert {source.read(n).data for n in range(6)} == {
        picture(n, kind=k) for n, k in enumerate(kinds.values())
    }


def test_what_the_reader_would_refuse_is_not_packed(tmp_path: Path) -> None:
    src = tmp_path / "src" / "a"
    fill(src, "1.jpg")
    Image.fromarray(np.full((8, 8), 300, np.float32)).save(src / "2.tif")
    Image.new("RGB", (1, 500)).save(src / "3.png")
    (one,) = folders(tmp_path / "src", tmp_path / "out", skip_broken=True, short_side=4)
    rejects = [json.loads(line) for line in (one.folder / "rejects.jsonl").read_text().splitlines()]
    assert [reject["path"] for reject in rejects] == ["a/2.tif", "a/3.png"]
    assert "floats, from 300 to 300" in rejects[0]["reason"]
    assert "sides may differ" in rejects[1]["reason"]


def test_links_pipes_and_cycles(tmp_path: Path) -> None:
    src = tmp_path / "src"
    fill(src, "cat/1.jpg", "dog/2.jpg")
    fill(tmp_path / "elsewhere", "3.jpg", "deep/4.jpg", start=5)
    os.symlink(tmp_path / "elsewhere", src / "fox")
    os.symlink(tmp_path / "elsewhere" / "3.jpg", src / "cat" / "linked.jpg")
    os.symlink(src, src / "cat" / "up")
    os.symlink(".", src / "dog" / "here")
    (one,) = folders(src, tmp_path / "whole")
    assert (one.num_samples, one.classes) == (5, ("cat", "dog", "fox"))
    assert any("cat: 1 links lead back to a folder that was met before" in note for note in one.notes)

    os.symlink("/nonexistent/cow", src / "cow")
    os.symlink("itself", src / "dog" / "itself")
    os.mkfifo(src / "dog" / "pipe.jpg")
    with pytest.raises(ValueError, match=r"cow is a link to /nonexistent/cow.*itself.*pipe.*--skip-broken"):
        folders(src, tmp_path / "out")
    (one,) = folders(src, tmp_path / "out", skip_broken=True)
    assert (one.num_samples, one.num_rejected) == (5, 3)
    assert len(build_index(one.folder).index) == 5


def test_listed_links_and_links_in_archives(tmp_path: Path) -> None:
    fill(tmp_path / "img", "0.jpg", "1.jpg")
    os.symlink("gone.jpg", tmp_path / "img" / "2.jpg")
    os.mkfifo(tmp_path / "img" / "3.jpg")
    table = tmp_path / "l.csv"
    table.write_text("path,label\n0.jpg,a\n1.jpg,b\n2.jpg,a\n3.jpg,b\n")
    with pytest.raises(ValueError, match=r"2 of 4 listed pictures are absent .*2\.jpg, 3\.jpg"):
        convert_csv(table, tmp_path / "img", tmp_path / "out", progress=False)
    (one,) = convert_csv(table, tmp_path / "img", tmp_path / "out", progress=False, skip_broken=True)
    assert (one.num_samples, one.num_rejected) == (2, 2)
    (tmp_path / "img" / "3.jpg").unlink()
    with tarfile.open(tmp_path / "img.tar", "w") as tar:
        for name in ("0.jpg", "1.jpg", "2.jpg"):
            tar.add(tmp_path / "img" / name, f"./{name}")
    with pytest.raises(ValueError, match=r"2\.jpg: is a link or a special file in the archive"):
        convert_csv(table, tmp_path / "img.tar", tmp_path / "two", progress=False)
    (one,) = convert_csv(table, tmp_path / "img.tar", tmp_path / "two", progress=False, skip_broken=True)
    assert (one.num_samples, one.num_rejected) == (2, 2)
