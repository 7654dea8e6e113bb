"""Converters of targets: COCO's JSON, a CSV of numbers, a folder of maps, into shards by one command."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from selfmask_dist import cli, data
from selfmask_dist.common.preprocessing import Preprocessing
from selfmask_dist.data.build import build_index


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for number in range(4):
        save(tmp_path / "images" / "all" / f"{number}.jpg", rng.integers(0, 256, (20, 30, 3), dtype=np.uint8))
    return tmp_path / "images"


def convert(*arguments: object) -> int:
    return cli.main(["data", "convert", *map(str, arguments)]) or 0


def opened(folder: Path) -> data.TarSource:
    built = build_index(folder)
    assert not [reject for reject in built.rejects if reject.is_lost]
    return data.open_source(folder, require_labels=False)


def by_picture(source: data.TarSource, kind: data.TargetKind) -> dict[str, list[float]]:
    targets = data.open_targets(source, kind)
    rows = targets.of(source, np.arange(len(source))).tolist()
    return {source.key(index): row for index, row in enumerate(rows)}


def coco(path: Path, **changes: object) -> Path:
    content = {
        "images": [{"id": 10 + n, "file_name": f"all/{n}.jpg"} for n in range(4)],
        "categories": [{"id": 7, "name": "cup"}, {"id": 3, "name": "table"}],
        "annotations": [
            {"image_id": image, "category_id": category}
            for image, category in ((10, 7), (10, 3), (11, 3), (11, 3), (13, 7))
        ],
    }
    path.write_text(json.dumps(content | changes))
    return path


def test_coco(images: Path, tmp_path: Path) -> None:
    assert convert("coco", coco(tmp_path / "instances_val2017.json"), images, tmp_path / "out") == 0
    source = opened(tmp_path / "out" / "val")
    assert data.open_targets(source, "multilabel").outputs == ("table", "cup")
    expected = {"all/0": [1.0, 1.0], "all/1": [1.0, 0.0], "all/2": [0.0, 0.0], "all/3": [0.0, 1.0]}
    assert by_picture(source, "multilabel") == expected


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"annotations": [{"image_id": 10, "category_id": 8}]}, "categories that it does not list: 8"),
        ({"annotations": [{"image_id": 99, "category_id": 7}]}, "images that it does not list: 99"),
        ({"categories": [{"id": 1}]}, "no file of COCO's form"),
        (
            {"images": [{"id": 1, "file_name": "all/x.jpg"}], "annotations": []},
            "all/x.jpg: listed, and there",
        ),
    ],
)
def test_a_bad_coco_file_is_named(
    images: Path,
    tmp_path: Path,
    changes: dict[str, object],
    complaint: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert convert("coco", coco(tmp_path / "c.json", **changes), images, tmp_path / "out") == 2
    assert complaint in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*/*"))


def test_numbers_of_a_list(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    splits = ["train", "train", "train", "test"]
    lines = [f"all/{n}.jpg;{n}.5;{split};{-n}" for n, split in enumerate(splits)]
    rows = ["file;price;split;weight", *lines]
    (tmp_path / "list.csv").write_text("\n".join(rows))
    values = ("--value", "weight", "--value", "price")
    assert convert("values", tmp_path / "list.csv", images, tmp_path / "out", *values) == 0
    source = opened(tmp_path / "out" / "train")
    assert data.open_targets(source, "regression").outputs == ("weight", "price")
    assert by_picture(source, "regression") == {f"all/{n}": [float(-n), n + 0.5] for n in range(3)}
    assert len(opened(tmp_path / "out" / "test")) == 1
    (tmp_path / "list.csv").write_text("\n".join([*rows[:2], "all/1.jpg;cheap;train;1", *rows[3:]]))
    arguments = ("values", tmp_path / "list.csv", images, tmp_path / "other", *values)
    assert convert(*arguments) == 2
    assert "all/1.jpg: line 3: price is 'cheap', no finite number" in capsys.readouterr().err
    assert convert(*arguments, "--skip-broken") == 0
    (reject,) = (tmp_path / "other" / "train" / "rejects.jsonl").read_text().splitlines()
    assert json.loads(reject)["path"] == "all/1.jpg"


def test_maps(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    maps, classes = tmp_path / "maps" / "all", ("--classes", "wall,cat")
    values = np.zeros((20, 30), dtype=np.uint8)
    values[5:15, 10:20], values[:4] = 1, 255
    for number in range(3):
        save(maps / f"{number}.png", values)
    assert convert("maps", images, maps.parent, tmp_path / "out", *classes) == 0
    source = opened(tmp_path / "out" / "train")
    targets = data.open_targets(source, "dense")
    assert targets.outputs == ("wall", "cat")
    (read, *_) = targets.maps(source, np.arange(3))
    assert read == (maps / "0.png").read_bytes()
    # shrunk pictures get shrunk maps
    arguments = (images, maps.parent, tmp_path / "small", *classes, "--short-side", 10)
    assert convert("maps", *arguments) == 0
    small = opened(tmp_path / "small" / "train")
    pre = data.DenseTransform(Preprocessing(8, (0.5,) * 3, (0.5,) * 3, crop_pct=1.0))
    loader = data.eval_loader(small, pre, batch_size=3).with_targets(data.open_targets(small, "dense"))
    (batch,) = loader
    assert batch.targets is not None
    assert set(batch.targets.unique().tolist()) == {0, 1, 255}
    save(maps / "1.png", values[:-1])
    save(maps / "2.png", np.where(values == 1, np.uint8(7), np.uint8(0)))
    assert convert("maps", images, maps.parent, tmp_path / "bad", *classes) == 2
    assert ".jpg: its label map has" in capsys.readouterr().err
    assert convert("maps", images, maps.parent, tmp_path / "bad", *classes, "--skip-broken") == 0
    lines = (tmp_path / "bad" / "train" / "rejects.jsonl").read_text().splitlines()
    reasons = {json.loads(line)["path"]: json.loads(line)["reason"] for line in lines}
    assert reasons.keys() == {"all/1.jpg", "all/2.jpg"}
    assert "30 x 19 pixels, and the picture 30 x 20" in reasons["all/1.jpg"]
    assert "value 7, and there are 2 classes" in reasons["all/2.jpg"]
