"""The blocks of shell in docs/targets.md are run, in order, on small data of each layout."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.docs import blocks, prepare, run
from tests.support.targets import sample
from tests.support.tiny_run import ROOT, SETTINGS

PAGE = ROOT / "docs" / "targets.md"
SITE = {
    "backbone": SETTINGS["backbone"],
    "engine": {"device": "cpu", "workers": 0, "threads": 1},
    "eval": {"knn_every": 0},
    "run": {"progress": False},
    "train": {"global_batch_size": 8, "epochs": 1},
}


def write_layouts(folder: Path) -> None:
    """COCO's JSON of two splits, a CSV and VOC-like folders, of the same 24 pictures."""
    rng = np.random.default_rng(0)
    for name in ("IMAGES", "MAPS"):
        (folder / name).mkdir()
    images, annotations, lines = [], [], ["path,price,weight"]
    for index in range(24):
        picture, about, seg = sample(index, rng)
        with (folder / "IMAGES" / f"{index}.png").open("wb") as file:
            file.write(picture)
        Image.open(folder / "IMAGES" / f"{index}.png").save(folder / "IMAGES" / f"{index}.jpg", quality=95)
        (folder / "IMAGES" / f"{index}.png").unlink()
        (folder / "MAPS" / f"{index}.png").write_bytes(seg)
        images.append({"id": index, "file_name": f"{index}.jpg"})
        annotations += [{"image_id": index, "category_id": 5 + label} for label in about["labels"]]
        lines.append(f"{index}.jpg,{about['value']},{index}")
    categories = [{"id": 5 + n, "name": name} for n, name in enumerate(("red", "green", "blue"))]
    for name, part in (("train", range(16)), ("val", range(16, 24))):
        content = {
            "images": [images[n] for n in part],
            "annotations": [one for one in annotations if one["image_id"] in part],
            "categories": categories,
        }
        (folder / f"instances_{name}.json").write_text(json.dumps(content))
        (folder / f"{name}.txt").write_text("".join(f"{n}\n" for n in part))
    (folder / "list.csv").write_text("\n".join(lines))


@pytest.mark.slow  # a process for each of 13 commands
def test_the_page_runs(tmp_path: Path) -> None:
    environment = prepare(tmp_path)
    path = tmp_path / "config" / "selfmask" / "site.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(SITE))
    write_layouts(tmp_path)
    convert, train = blocks(PAGE)
    run(convert, tmp_path, environment)
    told = run(train, tmp_path, environment)
    for measure in ("head_map", "probe_map", "head_r2", "head_miou", "value", "probability"):
        assert measure in told, measure
    assert json.loads((tmp_path / "runs" / "maps" / "result.json").read_text())["adapted"]["head_miou"] > 0
