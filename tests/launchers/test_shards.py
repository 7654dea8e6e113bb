"""`data.train` that is a folder of pictures: what it is taken for, its tars, and a run on them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launchers.shards import PictureFolder, convert, is_picture_folder, picture_folders
from launchers.submit import main
from selfmask_dist.config import load_config
from selfmask_dist.config.site import Site, SiteConfig
from selfmask_dist.data import open_source

ROOT = Path(__file__).resolve().parents[2]


def save(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two splits of two classes, two pictures each; one more file is broken."""
    folder = tmp_path / "pets"
    for number, (split, name, index) in enumerate(
        (split, name, index) for split in ("train", "Test") for name in ("cat", "dog") for index in range(2)
    ):
        save(folder / split / name / f"{index}.png", number)
    (folder / "train" / "cat" / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return folder


def folders(tmp_path: Path, *settings: str, site: Site | None = None) -> list[PictureFolder]:
    config = load_config(None, [f"run.dir={tmp_path / 'runs'}", *settings])
    return picture_folders(config, site or Site())


def test_layouts(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SELFMASK_DATA", raising=False)

    def found(*settings: str) -> list[tuple[str, str, str]]:
        return [(one.src.name, one.split, one.layout) for one in folders(tmp_path, *settings)]

    both = [("pets", "train", "auto"), ("pets", "test", "auto")]
    assert found(f"data.train={tree}") == both
    assert found(f"data.train={tree}", f"data.test={tree}") == both
    assert found(f"data.train={tree}", "data.held_out=0.5") == both[:1]
    # without labels where none are needed, and there is nothing to measure them on
    assert found(f"data.train={tree}/train", "objective.name=nbd") == [("train", "train", "unlabelled")]
    assert found(f"data.train={tree}", "objective.name=nbd") == both
    save(tree / "train" / "loose.png", 0)
    flat = [("train", "train", "unlabelled"), ("Test", "test", "auto")]
    assert found(f"data.train={tree}", f"data.test={tree}/Test", "objective.name=nbd") == flat
    # the test split's pictures are never trained on, whatever the folders are
    assert found(f"data.train={tree}", "objective.name=nbd") == flat[:1]


def test_what_is_no_folder_of_pictures_stays_as_it_is(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "0.tar").touch()
    for text in ("empty", "tars", "nowhere"):
        assert not is_picture_folder(str(tmp_path / text))
    assert not is_picture_folder("s3://bucket/pets")
    assert is_picture_folder(str(tree))


def test_tars_go_into_the_data_root_where_it_may_be_written_to(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SELFMASK_DATA", raising=False)
    (tmp_path / "sets").mkdir()
    site = Site(own=SiteConfig(data_root=str(tmp_path / "sets")))
    (first, _) = folders(tmp_path, f"data.train={tree}", site=site)
    assert first.target.parent.parent == tmp_path / "sets"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    (first, _) = folders(tmp_path, f"data.train={tree}", site=site)
    assert first.target.parent.parent == tmp_path / "runs" / "shards"


def test_a_site_names_a_folder_of_pictures(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SELFMASK_DATA", raising=False)
    flat = tmp_path / "flat"
    save(flat / "a.png", 0)
    for folder, name in ((flat, "photos"), (tree, "pets")):
        site = Site(own=SiteConfig(data={name: str(folder)}))
        config = load_config(None, [f"data.train={name}", "objective.name=nbd"], site=site)
        (found, *_) = picture_folders(config, site)
        assert found.src == (flat if name == "photos" else tree / "train")
        assert found.layout == "unlabelled"


def test_a_folder_is_converted_once_and_a_changed_one_is_refused(
    tree: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train, test = folders(tmp_path, f"data.train={tree}")
    convert(train)
    convert(test)
    said = capfd.readouterr().err
    assert "train/cat/cut.png" in said
    assert "its folders are classes" in said
    source = open_source(train.target)
    assert (len(source), source.classes, source.index.has_crc32) == (4, ("cat", "dog"), True)
    assert len(open_source(test.target, classes=source.classes)) == 4
    before = {path: path.stat().st_mtime_ns for path in train.target.iterdir()}
    convert(train)
    assert {path: path.stat().st_mtime_ns for path in train.target.iterdir()} == before
    save(tree / "train" / "cat" / "0.png", 99)  # as many files, other bytes
    os.utime(tree / "train" / "cat" / "0.png", ns=(1, 1))
    with pytest.raises(ValueError, match="was not converted"):
        convert(train)
    said = capfd.readouterr().err
    assert "before some of its 9 files changed; remove" in said
    assert f"data.train={train.target}" in said
    assert {path: path.stat().st_mtime_ns for path in train.target.iterdir()} == before


def test_a_killed_conversion_goes_on(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    for number in range(30):
        save(photos / f"{number}.png", number)
    out = tmp_path / "out"
    command = [sys.executable, "-c", _SLOW_CONVERSION, str(photos), str(out)]
    with subprocess.Popen(command, cwd=ROOT) as process:
        while not list((out / "train").glob(".shard-000001.*report")) and process.poll() is None:
            pass
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    kept = {path.name: path.stat().st_mtime_ns for path in (out / "train").glob(".shard-*.partial")}
    assert len(kept) >= 2
    command[2] = _SLOW_CONVERSION.replace("time.sleep(0.1)", "pass")
    subprocess.run(command, cwd=ROOT, check=True)
    for name, stamp in kept.items():
        shard = out / "train" / name.removeprefix(".").removesuffix(".partial")
        assert shard.stat().st_mtime_ns == stamp, "a finished shard was written again"
    assert len(open_source(out / "train", require_labels=False)) == 30


_SLOW_CONVERSION = """
import sys, time
from data_prep import image_folder, writer
encode = writer.read_picture
def slow(*args, **kwargs):
    time.sleep(0.1)
    return encode(*args, **kwargs)
writer.read_picture = slow
image_folder.main([*sys.argv[1:], "--once", "--layout", "unlabelled", "--max-samples-per-shard", "5"])
"""


def test_dry_run_says_what_would_be_converted_and_converts_nothing(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--cluster", "local", "--dry-run", "--plan-seconds", "0", f"run.dir={tmp_path / 'runs'}"]
    assert main([*words, f"data.train={tree}"]) == 0
    captured = capsys.readouterr()
    assert f"# data.train: {tree} is a folder of pictures (its folders are classes)" in captured.out
    assert "note:" not in captured.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_run_starts_from_a_folder_of_pictures_and_goes_on_from_its_tars(
    tree: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["--cluster", "local", f"run.dir={tmp_path / 'runs'}", "run.name=a", "method=frozen"]
    words += ["backbone.name=timm:resnet18", "backbone.pretrained=false", "engine.workers=0"]
    words += ["eval.knn_k=[1]", "train.global_batch_size=4", f"data.train={tree}"]
    assert main(words) == 0, capfd.readouterr().err
    result = json.loads((tmp_path / "runs" / "a" / "result.json").read_text())
    assert result
    assert main([*words, "run.resume=true"]) == 0
    assert "nothing is left to do" in capfd.readouterr().err
