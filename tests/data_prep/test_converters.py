"""Converters on small trees in the published layouts, and on real images."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep import csv_manifest, inaturalist, sun397, torchvision_dataset
from data_prep.csv_manifest import convert_csv
from data_prep.image_folder import convert_image_folder
from data_prep.inaturalist import convert_inaturalist
from data_prep.sun397 import convert_sun397
from data_prep.torchvision_dataset import convert_torchvision
from selfmask_dist.data import check_same_classes, decode, open_source
from selfmask_dist.data.build import build_index
from tests.support.published_trees import contents, inat, save, sun, tree
from tests.support.tars import picture

# Python 3.11.3 and older know no filters
SAFELY: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}


@pytest.mark.parametrize("year", [2017, 2021])
def test_inaturalist(tmp_path: Path, year: int) -> None:
    train, val = (inat(tmp_path / "src", year, split) for split in ("train", "val"))
    done = convert_inaturalist(tmp_path / "src", tmp_path / "out", train=train, val=val, progress=False)
    assert [conversion.num_samples for conversion in done] == [9, 9]
    sources = [open_source(tmp_path / "out" / split) for split in ("train", "val")]
    check_same_classes(*sources)
    assert sources[0].classes[1] == "00001_Rosa canina"
    for source, offset in zip(sources, (0, 100), strict=True):
        for i in range(9):
            sample = source.read(i)
            number = int(sample.key[-6:-3])
            assert sample.data == picture(number + offset)
            assert sample.label == number % 3


def test_inaturalist_from_the_published_archive(tmp_path: Path) -> None:
    src = tmp_path / "src"
    train = inat(src, 2021, "train")
    archive = tmp_path / "train.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(src / "train", "train")
    convert_inaturalist(archive, tmp_path / "a", train=train, progress=False, max_samples_per_shard=4)
    convert_inaturalist(src, tmp_path / "b", train=train, progress=False)
    a, b = (open_source(tmp_path / name / "train") for name in "ab")
    assert {(s.key, s.data, s.label) for s in map(a.read, range(9))} == {
        (s.key, s.data, s.label) for s in map(b.read, range(9))
    }
    archive.write_bytes(archive.read_bytes()[:-2000])
    with pytest.raises(ValueError, match=r"train\.tar\.gz: (damaged|only)"):
        convert_inaturalist(archive, tmp_path / "c", train=train, progress=False)


def test_a_subset_of_the_categories(tmp_path: Path) -> None:
    train = inat(tmp_path / "src", 2021, "train")
    out = tmp_path / "out"
    (done,) = convert_inaturalist(tmp_path / "src", out, train=train, max_classes=2, progress=False)
    assert (done.classes, done.num_samples) == (("00000_Sterna hirundo", "00001_Rosa canina"), 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop("annotations"), "lacks annotations; the published test sets"),
        (lambda v: v["annotations"].pop(), "image 15 .* has no annotation"),
        (lambda v: v["annotations"][0].update(category_id=99), "category 99, which is not listed"),
        (
            lambda v: v["images"][0].update(file_name="gone.jpg"),
            r"1 of 9 listed .* absent .*gone\.jpg",
        ),
        (lambda v: v["images"][0].update(file_name="../x.jpg"), "leads out of the image folder"),
        (
            lambda v: v["images"].append(v["images"][0] | {"id": 8}),
            r"1 pictures are listed under two classes \(train/00000_",
        ),
        (lambda v: v["images"][1].pop("file_name"), r"train\.json: entry 1 of images needs id and file_name"),
        (lambda v: v["annotations"][2].pop("image_id"), "entry 2 of annotations needs image_id and category"),
        (lambda v: v["annotations"][2].update(category_id="rose"), "entry 2 of annotations .*'rose'"),
        (lambda v: v["categories"][0].update(name=None), "entry 0 of categories needs id and name"),
        (lambda v: v.update(images={"7": "a.jpg"}), "entry 0 of images needs"),
    ],
)
def test_bad_json_is_told(tmp_path: Path, change: Any, message: str) -> None:
    train = inat(tmp_path / "src", 2021, "train")
    values = json.loads(train.read_text())
    change(values)
    train.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        convert_inaturalist(tmp_path / "src", tmp_path / "out", train=train, progress=False)


def test_splits_that_name_a_category_differently_are_refused(tmp_path: Path) -> None:
    train, val = (inat(tmp_path / "src", 2021, split) for split in ("train", "val"))
    val.write_text(val.read_text().replace("Rosa canina", "Rosa alba"))
    with pytest.raises(ValueError, match=r"val\.json: its categories are not those of train .*Rosa alba"):
        convert_inaturalist(tmp_path / "src", tmp_path / "out", train=train, val=val, progress=False)
    with pytest.raises(ValueError, match="max classes is 0"):
        convert_inaturalist(tmp_path / "src", tmp_path / "out", train=train, max_classes=0, progress=False)


def test_an_archive_that_ends_early_or_repeats_itself(tmp_path: Path) -> None:
    src = tmp_path / "src"
    train = inat(src, 2021, "train")
    archive = tmp_path / "train.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for _ in range(2):  # every name twice: the first one counts
            tar.add(src / "train", "train")
    (done,) = convert_inaturalist(archive, tmp_path / "twice", train=train, progress=False)
    assert done.num_samples == len(open_source(tmp_path / "twice" / "train")) == 9
    whole = archive.read_bytes()
    for number, length in enumerate((0, 5, 400, len(whole) // 3)):
        archive.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"train\.tar\.gz: (damaged|only)"):
            convert_inaturalist(archive, tmp_path / f"cut{number}", train=train, progress=False)
        assert not list((tmp_path / f"cut{number}" / "train").iterdir())
    for place in (len(whole) // 8, len(whole) // 4):
        archive.write_bytes(whole[:place] + bytes(64) + whole[place + 64 :])
        with pytest.raises(ValueError, match=r"(train\.tar\.gz: (damaged|only)|cannot be read)"):
            convert_inaturalist(archive, tmp_path / "rotten", train=train, progress=False)


def test_sun397(tmp_path: Path) -> None:
    sun(tmp_path / "src")
    done = convert_sun397(tmp_path / "src", tmp_path / "out", partition=2, progress=False)
    assert [conversion.num_samples for conversion in done] == [9, 3]
    train, test = (open_source(tmp_path / "out" / split) for split in ("train", "test"))
    assert train.classes == test.classes == ("abbey", "apartment_building/outdoor", "bank_vault")
    keys = {train.key(i): train.read(i) for i in range(9)}
    assert keys["a/apartment_building/outdoor/sun_11"].data == picture(11)
    assert keys["a/apartment_building/outdoor/sun_11"].label == 1
    with pytest.raises(ValueError, match=r"Training_03\.txt: no such file"):
        convert_sun397(tmp_path / "src", tmp_path / "two", partition=3, progress=False)
    with pytest.raises(ValueError, match="partition is 11"):
        convert_sun397(tmp_path / "src", tmp_path / "two", partition=11, progress=False)
    (tmp_path / "src" / "a" / "abbey" / "sun_00.jpg").unlink()
    with pytest.raises(ValueError, match=r"train: 1 of 9 listed pictures are absent .*a/abbey/sun_00\.jpg"):
        convert_sun397(tmp_path / "src", tmp_path / "two", partition=2, progress=False)
    lists = tmp_path / "src" / "Testing_02.txt"
    for content, message in ((b"", "it is empty"), (b"/a/abbey/\xff.jpg", "not a readable list")):
        lists.write_bytes(content)
        with pytest.raises(ValueError, match=rf"Testing_02\.txt: {message}"):
            convert_sun397(tmp_path / "src", tmp_path / "two", partition=2, progress=False)
    names = tmp_path / "src" / "ClassName.txt"
    names.write_text(names.read_text() + "/b/abbey\n")
    lists.write_text("/a/abbey/sun_30.jpg\n")
    with pytest.raises(ValueError, match=r"classes have the same name \(abbey\)"):
        convert_sun397(tmp_path / "src", tmp_path / "two", partition=2, progress=False)


def test_csv(tmp_path: Path) -> None:
    for n in range(4):
        save(tmp_path / "src" / f"{n}.jpg", n)
    table = tmp_path / "list.csv"
    table.write_text("path,label,split\n0.jpg,cat,train\n1.jpg,dog,train\n2.jpg,dog,val\n3.jpg,cat,val\n")
    convert_csv(table, tmp_path / "src", tmp_path / "out", progress=False)
    val = open_source(tmp_path / "out" / "val")
    assert {(val.key(i), int(val.labels[i])) for i in range(2)} == {("2", 1), ("3", 0)}
    table.write_bytes(b"\xef\xbb\xbfpath,label\r\n0.jpg,cat\r\n")  # as a spreadsheet writes it
    assert convert_csv(table, tmp_path / "src", tmp_path / "bom", progress=False)[0].num_samples == 1
    for content, message in (
        (b"path,label\n0.jpg,cat,dog\n", "line 2: more fields than columns"),
        (b"path,label,split\n0.jpg,cat,..\n", "line 2: a field is empty or no name"),
        (b"path,label\n\xff.jpg,cat\n", "'utf-8' codec"),
    ):
        table.write_bytes(content)
        with pytest.raises(ValueError, match=rf"list\.csv: {message}"):
            convert_csv(table, tmp_path / "src", tmp_path / "two", progress=False)
    table.write_text("nr,label\n0.jpg,cat\n")
    with pytest.raises(ValueError, match=r"no column path .*--path-column"):
        convert_csv(table, tmp_path / "src", tmp_path / "two", progress=False)
    table.write_text("path,label\n0.jpg,\n")
    with pytest.raises(ValueError, match=r"list\.csv: line 2: a field is empty"):
        convert_csv(table, tmp_path / "src", tmp_path / "two", progress=False)


def test_torchvision_arrays_and_files(tmp_path: Path) -> None:
    import pickle

    folder = tmp_path / "root" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (10, 3072), dtype=np.uint8)
    batch = pickle.dumps({"data": pixels, "labels": list(range(10))})
    from torchvision.datasets import CIFAR10  # type: ignore[import-untyped]

    names = [name for name, _ in CIFAR10.train_list + CIFAR10.test_list]
    for name in names:
        (folder / name).write_bytes(batch)
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CIFAR10, "_check_integrity", lambda self: True)
        patch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
        convert_torchvision("CIFAR10", tmp_path / "root", tmp_path / "out", splits=["test"], progress=False)
    data = open_source(tmp_path / "out" / "test")
    assert data.classes == tuple("abcdefghij")
    for i in range(10):
        expected = pixels[int(data.key(i))].reshape(3, 32, 32).transpose(1, 2, 0)
        assert (np.asarray(decode(data.read(i).data)) == expected).all()
    for n in range(3):
        save(tmp_path / "tree" / "x" / f"{n}.jpg", n)
    with pytest.raises(ValueError, match="torchvision has no data set 'Nothing'"):
        convert_torchvision("Nothing", tmp_path, tmp_path / "two", progress=False)


def test_another_plan_does_not_go_on_with_old_shards(tmp_path: Path) -> None:
    tree(tmp_path / "src", 8)
    out = tmp_path / "out"
    out.mkdir()
    (out / ".plan.report").write_text("another")
    (out / ".shard-000000.tar.report").write_text("{}")
    (out / ".shard-000000.tar.partial").write_bytes(b"old")
    convert_image_folder(tmp_path / "src", out, progress=False)
    assert sorted(contents(out)) == ["dataset.json", "shard-000000.tar"]
    assert len(open_source(out)) == 8


@pytest.mark.slow
def test_workers_change_no_byte(tmp_path: Path) -> None:
    tree(tmp_path / "src", 12)
    for workers in (1, 2):
        convert_image_folder(
            tmp_path / "src",
            tmp_path / str(workers),
            max_samples_per_shard=4,
            progress=False,
            num_workers=workers,
        )
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_rot_after_packing_is_found_by_the_samples_own_checksum(tmp_path: Path) -> None:
    tree(tmp_path / "src", 6)
    convert_image_folder(tmp_path / "src", tmp_path / "out", progress=False)
    tar = tmp_path / "out" / "shard-000000.tar"
    good = picture(4)
    rotten = good[:-40] + bytes(b ^ 1 for b in good[-40:-30]) + good[-30:]
    tar.write_bytes(tar.read_bytes().replace(good, rotten))
    with pytest.raises(ValueError, match=r"1 of 6 .*'class1/004' has other bytes than were packed"):
        build_index(tmp_path / "out", decode_check=False)
    tar.write_bytes(tar.read_bytes().replace(rotten, good))
    build_index(tmp_path / "out")
    convert_image_folder(tmp_path / "src", tmp_path / "out", overwrite=True, progress=False)
    assert "samples.index" not in contents(tmp_path / "out"), "an index of the old shards is gone with them"


@pytest.mark.parametrize("module", [inaturalist, sun397, csv_manifest, torchvision_dataset])
def test_command_lines(module: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = {
        inaturalist: ["absent", str(tmp_path / "out"), "--train", "absent.json"],
        sun397: ["absent", str(tmp_path / "out")],
        csv_manifest: ["absent.csv", "absent", str(tmp_path / "out")],
        torchvision_dataset: ["Flowers102", str(tmp_path / "absent"), str(tmp_path / "out")],
    }[module]
    assert module.main(arguments) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_real_images_convert_and_read_back(shared_data: Path, tmp_path: Path) -> None:
    with tarfile.open(shared_data / "clothing" / "val.tar") as tar:
        tar.extractall(tmp_path / "src", **SAFELY)
    (done,) = convert_image_folder(
        tmp_path / "src", tmp_path / "out", progress=False, max_samples_per_shard=100
    )
    built = build_index(done.folder)
    assert (done.num_samples, built.rejects) == (341, ())
    data = open_source(done.folder)
    original = open_source(shared_data / "clothing" / "val.tar")
    assert data.classes == original.classes
    assert {data.read(i).data for i in range(341)} == {original.read(i).data for i in range(341)}
    assert Image.open(io.BytesIO(data.read(0).data)).mode == "RGB"


def test_a_list_of_real_images_converts_from_its_tar_and_from_files(
    shared_data: Path, tmp_path: Path
) -> None:
    archive = shared_data / "grocery" / "val.tar"
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "src", **SAFELY)
    files = sorted(path.relative_to(tmp_path / "src") for path in (tmp_path / "src").rglob("*.jpg"))
    lines = [f"{path},{path.parts[0]},{'val' if n % 5 == 0 else 'train'}\n" for n, path in enumerate(files)]
    (tmp_path / "list.csv").write_text("path,label,split\n" + "".join(lines))
    for name, images in (("tar", archive), ("files", tmp_path / "src")):
        done = convert_csv(
            tmp_path / "list.csv", images, tmp_path / name, progress=False, max_samples_per_shard=100
        )
        assert {conversion.folder.name: conversion.num_samples for conversion in done} == {
            "val": 60,
            "train": 236,
        }
    for split in ("val", "train"):
        a, b = (open_source(tmp_path / name / split) for name in ("tar", "files"))
        check_same_classes(a, b)
        samples = [
            {s.key: (s.label, s.data) for s in map(source.read, range(len(source)))} for source in (a, b)
        ]
        assert samples[0] == samples[1]
        for key, (label, data) in samples[0].items():
            assert data == (tmp_path / "src" / f"{key}.jpg").read_bytes()
            assert a.classes[label] == key.partition("/")[0]
        assert build_index(tmp_path / "files" / split).rejects == ()
