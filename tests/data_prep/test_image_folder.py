"""An image folder becomes tars that any WebDataset reader reads: all pictures, or an error."""

import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from data_prep import image_folder, shards
from data_prep.image_folder import convert_image_folder, main
from selfmask_dist.data import check_same_classes, decode, open_source


def save(
    path: Path, seed: int, *, size: tuple[int, int] = (20, 12), mode: str = "RGB", kind: str = "JPEG"
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, kind)


FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}


@pytest.fixture
def src(tmp_path: Path) -> Path:
    """Seven pictures of three classes, with names that need care."""
    folder = tmp_path / "src"
    save(folder / "cat" / "1.jpg", 1)
    save(folder / "cat" / "1.png", 2, kind="PNG")
    save(folder / "cat" / "1-2.jpg", 3)
    save(folder / "t-shirt v1.0" / "a.b.JPEG", 4)
    save(folder / "t-shirt v1.0" / "deep" / "a.webp", 5, kind="WEBP")
    save(folder / "z\u00fc" / "misnamed.jpg", 6, kind="PNG")
    save(folder / "z\u00fc" / f"{'long' * 40}.jpg", 7)
    (folder / "cat" / ".DS_Store").write_bytes(b"hidden")
    (folder / "LICENSE").write_text("not in a class folder")
    return folder


def convert(src: Path, out: Path, **options: object) -> list[shards.Conversion]:
    return convert_image_folder(src, out, progress=False, **options)  # type: ignore[arg-type]


def test_every_picture_arrives_with_its_bytes_and_label(src: Path, tmp_path: Path) -> None:
    (done,) = convert(src, tmp_path / "out", max_samples_per_shard=3)
    assert (done.num_samples, done.num_rejected) == (7, 0)
    assert sorted(path.name for path in done.folder.iterdir()) == [
        "dataset.json",
        *(f"shard-00000{number}.tar" for number in range(3)),
    ]
    data = open_source(done.folder)
    assert data.classes == done.classes == ("cat", "t-shirt v1.0", "z\u00fc")
    found = {data.read(i).data: (data.key(i), data.read(i).label) for i in range(len(data))}
    files = [path for path in src.rglob("*") if path.is_file() and path.suffix and path.name[0] != "."]
    assert found.keys() == {path.read_bytes() for path in files}
    for path in files:
        key, label = found[path.read_bytes()]
        assert data.classes[label] == path.relative_to(src).parts[0] == key.partition("/")[0]
    assert sorted(key for key, _ in found.values())[:4] == [
        "cat/1",
        "cat/1-2",
        "cat/1-3",
        "t-shirt v1.0/a_b",
    ]


@pytest.mark.filterwarnings(
    "ignore:unclosed file:ResourceWarning"
)  # webdataset leaves closing to the collector
def test_webdatasets_own_reader_reads_the_same(src: Path, tmp_path: Path) -> None:
    (done,) = convert(src, tmp_path / "out", max_samples_per_shard=4)
    data = open_source(done.folder)
    urls = [str(path) for path in sorted(done.folder.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [data.key(index) for index in range(7)]
    for index, sample in enumerate(samples):
        (extension,) = sample.keys() & {"jpg", "png", "webp"}
        assert Image.open(io.BytesIO(sample[extension])).format == FORMATS[extension]
        assert sample[extension] == data.read(index).data
        assert int(sample["cls"]) == data.labels[index]
        about = json.loads(sample["json"])
        assert (src / about["path"]).read_bytes() == sample[extension]
        assert about["class"] == data.classes[data.labels[index]]


def test_the_same_folder_gives_the_same_bytes(src: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    convert(src, first, max_samples_per_shard=3)
    for path in src.rglob("*"):
        os.utime(path, (1, 1))
    convert(src, second, max_samples_per_shard=3)
    names = {path.name for path in first.iterdir()}
    assert names == {path.name for path in second.iterdir()}
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_the_description_counts_and_sums(src: Path, tmp_path: Path) -> None:
    (done,) = convert(src, tmp_path / "out", max_samples_per_shard=5)
    about = json.loads((done.folder / "dataset.json").read_text())
    assert about["num_samples"] == 7
    assert about["samples_per_class"] == {"cat": 3, "t-shirt v1.0": 2, "z\u00fc": 2}
    assert [shard["samples"] for shard in about["shards"]] == [5, 2]
    for shard in about["shards"]:
        data = (done.folder / shard["name"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["bytes"], shard["sha256"])


def test_splits_share_one_class_list(tmp_path: Path) -> None:
    for split, names in (("train", "abc"), ("test", "ca")):
        for number, name in enumerate(names):
            save(tmp_path / "src" / split / name / "1.jpg", number)
    done = convert(tmp_path / "src", tmp_path / "out")
    assert {conversion.folder.name for conversion in done} == {"train", "test"}
    train, test = (open_source(tmp_path / "out" / split) for split in ("train", "test"))
    check_same_classes(train, test)
    assert test.classes == ("a", "b", "c")
    assert sorted(test.labels.tolist()) == [0, 2]

    convert(tmp_path / "src", tmp_path / "one", split="test")
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["test"]
    assert open_source(tmp_path / "one" / "test").classes == ("a", "b", "c")
    with pytest.raises(ValueError, match="no split 'val', it has test, train"):
        convert(tmp_path / "src", tmp_path / "two", split="val")


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    for name in ("plane", "train"):
        save(tmp_path / "src" / name / "1.jpg", 1)
    (done,) = convert(tmp_path / "src", tmp_path / "out", split="test")
    assert done.folder == tmp_path / "out" / "test"
    assert open_source(done.folder).classes == ("plane", "train")


def test_a_folder_without_classes_becomes_pictures_without_labels(src: Path, tmp_path: Path) -> None:
    (src / "LICENSE").unlink()
    save(src / "loose.jpg", 8)
    with pytest.raises(ValueError, match=r"outside of class folders \(loose.jpg\).*--layout unlabelled"):
        convert(src, tmp_path / "out")
    (done,) = convert(src, tmp_path / "out", layout="unlabelled")
    assert (done.num_samples, done.classes) == (8, ())
    assert done.notes == (
        "1 hidden files or folders, or those of a system, are left out (cat/.DS_Store)",
        "8 of 8 pictures have no label",
    )
    data = open_source(done.folder, require_labels=False)
    assert (data.labels == -1).all()
    assert {data.key(i) for i in range(8)} == {
        *("cat__1", "cat__1-2", "cat__1-3", "loose", "t-shirt v1_0__a_b", "t-shirt v1_0__deep__a"),
        *("z\u00fc__misnamed", f"z\u00fc__{'long' * 40}"),
    }
    (src / "notes.txt").write_text("no picture")
    with pytest.raises(ValueError, match=r"files that are not pictures \(notes.txt\)"):
        convert(src, tmp_path / "other", layout="unlabelled")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no pictures, in it or in its folders"):
        convert(tmp_path / "empty", tmp_path / "third", layout="unlabelled")


def test_large_pictures_shrink_and_small_ones_keep_their_bytes(tmp_path: Path) -> None:
    src = tmp_path / "src" / "c"
    save(src / "large.jpg", 1, size=(90, 60))
    save(src / "clear.png", 2, size=(40, 80), mode="RGBA", kind="PNG")
    save(src / "small.jpg", 3, size=(30, 70))
    (done,) = convert(tmp_path / "src", tmp_path / "out", short_side=30, quality=80)
    data = open_source(done.folder)
    sizes = {data.key(index): decode(data.read(index).data).size for index in range(3)}
    assert sizes == {"c/large": (45, 30), "c/clear": (30, 60), "c/small": (30, 70)}
    bytes_of = {data.key(index): data.read(index).data for index in range(3)}
    assert bytes_of["c/small"] == (src / "small.jpg").read_bytes()
    expected = io.BytesIO()
    image = Image.open(src / "large.jpg").resize((45, 30), Image.Resampling.LANCZOS)
    image.save(expected, "JPEG", quality=80)
    assert bytes_of["c/large"] == expected.getvalue()


def test_broken_files_are_named_or_listed(src: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (src / "cat" / "bad.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"bad\.jpg: not a picture .*--skip-broken"):
        convert(src, out)
    (src / "cat" / "cut.jpg").write_bytes((src / "cat" / "1.jpg").read_bytes()[:-200])
    (src / "cat" / "notes.txt").write_text("x")
    save(src / "cat" / "animated.png", 1, kind="GIF")
    with pytest.raises(ValueError, match=r"not pictures \(cat/notes\.txt\).*--skip-broken"):
        convert(src, out)
    (done,) = convert(src, out, skip_broken=True)
    assert (done.num_samples, done.num_rejected) == (8, 3)
    assert len(open_source(out)) == 8
    rejects = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert {reject["path"]: reject["reason"].split(" (")[0] for reject in rejects} == {
        "cat/bad.jpg": "not a picture that PIL can read",
        "cat/cut.jpg": "cannot be decoded",
        "cat/notes.txt": "not a picture by its name or its first bytes",
    }


def test_a_failed_conversion_leaves_nothing_and_harms_nothing(src: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(src, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    save(src / "cat" / "9.jpg", 9)
    (src / "z\u00fc" / "bad.jpg").write_bytes(b"no picture")
    for target in (out, tmp_path / "new"):
        with pytest.raises(ValueError, match=r"bad\.jpg"):
            convert(src, target, max_samples_per_shard=1, overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert list((tmp_path / "new").iterdir()) == []


def test_an_earlier_conversion_is_replaced_only_on_request(src: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(src, out, max_samples_per_shard=1)
    with pytest.raises(ValueError, match=r"is not empty; .*--overwrite"):
        convert(src, out)
    (out / ".shard-000009.tar.partial").write_bytes(b"of a conversion that was killed")
    convert(src, out, overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == ["dataset.json", "shard-000000.tar"]
    assert len(open_source(out)) == 7
    (out / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"holds files that no conversion wrote \(thesis\.tex\)"):
        convert(src, out, overwrite=True)


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    src, out = tmp_path / "src", tmp_path / "out"
    with pytest.raises(ValueError, match="src: no such folder"):
        convert(src, out)
    src.mkdir()
    with pytest.raises(ValueError, match="no class folders with pictures"):
        convert(src, out)
    (src / "empty").mkdir()
    save(src / "full" / "1.jpg", 1)
    with pytest.raises(ValueError, match="empty: a class folder without pictures"):
        convert(src, out)
    (src / "empty").rmdir()
    with pytest.raises(ValueError, match="lies inside"):
        convert(src, src / "out")
    save(src / "loose.jpg", 1)
    with pytest.raises(ValueError, match=r"outside of class folders \(loose\.jpg\)"):
        convert(src, out)
    (src / "loose.jpg").unlink()
    save(src / "train" / "full" / "1.jpg", 1)
    with pytest.raises(ValueError, match=r"holds splits \(train\) and other folders \(full\)"):
        convert(src, out)
    for options in ({"max_samples_per_shard": 0}, {"short_side": 0}, {"quality": 100}):
        with pytest.raises(ValueError, match=r"is (0|100); "):
            convert(src, out, **options)
    assert not out.exists()


def test_command_line(src: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(src), str(tmp_path / "out"), "--max-samples-per-shard", "4"]) == 0
    assert "out: 7 samples, 3 classes" in capsys.readouterr().out
    assert main([str(src), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'out'} is not empty")


def test_a_mistake_is_told_without_waiting_for_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from data_prep.image_folder import main; status = main(sys.argv[1:]);"
        "sys.exit('torch was imported' if 'torch' in sys.modules else status)"
    )
    root = Path(image_folder.__file__).parents[1]
    arguments = [sys.executable, "-W", "error", "-c", code, "absent", str(tmp_path)]
    result = subprocess.run(arguments, cwd=root, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (2, "error: absent: no such folder\n")
