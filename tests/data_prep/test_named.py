"""The paper's data sets by name: from files that are there to indexed tars, and what is said without them."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from data_prep.prepared.named import SETS, bring, get_named
from selfmask_dist.cli import main
from selfmask_dist.data import open_source
from tests.support.tars import picture


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data root that this process knows, and no network."""
    monkeypatch.setenv("SELFMASK_DATA", str(tmp_path / "sets"))

    def refuse(*_: object, **__: object) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    return tmp_path / "sets"


def place(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def test_arrays_that_torchvision_reads(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")
    # ten pictures cannot have the published checksums
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    rng = np.random.default_rng(0)
    folder = root / "originals" / "cifar10" / "cifar-10-batches-py"
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        pixels = rng.integers(0, 256, (2, 3072), dtype=np.uint8)
        place(folder / name, pickle.dumps({"data": pixels, "labels": [0, 1]}))
    place(folder / "batches.meta", pickle.dumps({"label_names": ["plane", "car"]}))
    assert main(["data", "get", "cifar10"]) == 0
    train = open_source(root / "cifar10" / "train")
    assert (len(train), train.classes, train.index.has_crc32) == (10, ("plane", "car"), True)
    assert len(open_source(root / "cifar10" / "test", classes=train.classes)) == 2
    # again: nothing is read or written
    before = (root / "cifar10" / "train" / "shard-000000.tar").stat().st_mtime_ns
    for path in folder.iterdir():
        path.unlink()
    get_named("cifar10", root)
    assert (root / "cifar10" / "train" / "shard-000000.tar").stat().st_mtime_ns == before


def test_files_of_a_set_without_splits(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchvision")
    for number in range(4):
        name = ("Forest", "River")[number % 2]
        place(root / "originals/eurosat/eurosat/2750" / name / f"{name}_{number}.jpg", picture(number))
    assert main(["data", "get", "eurosat"]) == 0
    said = capsys.readouterr().out
    assert "data.held_out=0.2 in place of data.test" in said
    assert "data.test=eurosat" not in said
    source = open_source(root / "eurosat" / "train")
    assert source.classes == ("Forest", "River")
    assert {source.read(i).data for i in range(4)} == {picture(number) for number in range(4)}


def test_pets_train_on_what_is_called_trainval(root: Path) -> None:
    pytest.importorskip("torchvision")
    folder = root / "originals/pets/oxford-iiit-pet"
    for split, start in (("trainval", 0), ("test", 10)):
        lines = [f"{name}_{start + label} {label} 1 1\n" for label, name in ((1, "bengal"), (2, "pug_dog"))]
        place(folder / "annotations" / f"{split}.txt", "".join(lines).encode())
        for line in lines:
            place(folder / "images" / f"{line.split()[0]}.jpg", picture(len(line) + start))
    get_named("pets", root)
    train = open_source(root / "pets" / "train")
    assert train.classes == ("Bengal", "Pug Dog")
    assert len(open_source(root / "pets" / "test", classes=train.classes)) == 2


@pytest.mark.parametrize("name", ["inat500", "inat21"])
def test_inaturalist_measures_on_its_validation_split(root: Path, name: str) -> None:
    folder = root / "originals" / "inat21"
    for split in ("train", "val"):
        names = [f"{split}/{number}.jpg" for number in range(2)]
        content = {
            "images": [{"id": number, "file_name": path} for number, path in enumerate(names)],
            "annotations": [{"image_id": number, "category_id": number} for number in range(2)],
            "categories": [{"id": number, "name": f"species {number}"} for number in range(2)],
        }
        place(folder / f"{split}.json", json.dumps(content).encode())
        for number, path in enumerate(names):
            place(folder / path, picture(number))
    get_named(name, root)
    train = open_source(root / name / "train")
    assert len(train.classes) == 2
    assert len(open_source(root / name / "test", classes=train.classes)) == 2


@pytest.mark.parametrize("name", sorted(SETS))
def test_without_files_and_network_it_is_said_what_goes_where(
    root: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "get", name]) == 2
    said = capsys.readouterr().err
    assert f"what has to lie in {root / 'originals'}" in said
    for line in SETS[name].files:
        assert line in said
    assert not list(root.glob(f"{name}/*/*.tar"))


def test_no_root_and_no_such_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SELFMASK_DATA", raising=False)
    assert bring("cifar10", None) == 2
    assert "export SELFMASK_DATA=DIR" in capsys.readouterr().err
    assert main(["data", "get", "mnist", "--root", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert all(name in said for name in SETS)
