"""`selfmask adapt`: a folder of pictures, some of them broken, to a mask and a report; and once more."""

import json
import re
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from selfmask_dist.cli import adapt, main
from selfmask_dist.cli.adapt import RUNS, prepare, settings_for
from tests.support.tiny_run import SETTINGS


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twenty pictures, flat and deeper, and three files that are none."""
    folder = tmp_path / "my photos"
    rng = np.random.default_rng(0)
    for index in range(20):
        path = folder / ("" if index % 2 else "2024/june") / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    (folder / "cut.png").write_bytes((folder / "1.png").read_bytes()[:60])
    (folder / "notes.txt").write_text("not a picture")
    (folder / "empty.jpg").touch()
    return folder


def test_pictures_become_tars_once_and_what_is_broken_is_named(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = tmp_path / "out" / "shards"
    assert prepare(photos, shards) == (shards / "train", 20)
    said = capsys.readouterr().out
    assert "20 pictures" in said
    assert "left out: 3 files" in said
    for name in ("cut.png", "notes.txt", "empty.jpg"):
        assert name in said
    before = (shards / "train" / "shard-000000.tar").stat().st_mtime_ns
    assert prepare(photos, shards) == (shards / "train", 20)
    assert (shards / "train" / "shard-000000.tar").stat().st_mtime_ns == before
    (photos / "3.png").unlink()
    with pytest.raises(ValueError, match=r"when it had 23 files, and now it has 22; remove .*train"):
        prepare(photos, shards)


def test_what_is_no_folder_of_pictures_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapt", str(tmp_path / "nowhere")]) == 2
    assert "nowhere is no folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["adapt", str(tmp_path / "empty"), "--out", str(tmp_path / "out")]) == 2
    assert "no pictures, in it or in its folders" in capsys.readouterr().err


def test_length_follows_the_number_of_pictures() -> None:
    def of(number: int) -> dict[str, float]:
        return {key: float(value) for key, _, value in (text.partition("=") for text in settings_for(number))}

    assert of(2640)["train.epochs"] == of(1_000_000)["train.epochs"] == 8
    assert of(50)["train.epochs"] == 100, "a hundred steps at least"
    assert of(50)["optim.warmup_epochs"] == 10


def test_the_sites_backbone_is_taken_whole_and_a_stop_says_how_it_goes_on(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The configuration that ships has a size of pictures of its own, which would win over the site's."""
    asked: list[tuple[str, ...]] = []

    def stopped(*words: str) -> int:
        asked.append(words)
        return 128 + signal.SIGTERM

    monkeypatch.setattr(adapt, "_selfmask", stopped)
    site = tmp_path / "site.yaml"
    site.write_text("backbone: {name: 'timm:vit_tiny_patch16_224', image_size: 64}\n")
    command = ["adapt", str(photos), f"--out={tmp_path / 'out'}", f"--site={site}"]
    assert main(command) == 143
    assert "the same command again goes on" in capsys.readouterr().out
    assert {"backbone.name=timm:vit_tiny_patch16_224", "backbone.image_size=64"} < set(asked[0])
    assert main([*command, "--backbone=timm:resnet18"]) == 143
    assert [word for word in asked[1] if word.startswith("backbone")] == ["backbone.name=timm:resnet18"]


@pytest.mark.slow
def test_one_command_gives_a_mask_and_a_report_and_then_says_that_it_is_done(
    photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    backbone = dict(SETTINGS["backbone"])
    words = [f"backbone.{key}={json.dumps(value)}" for key, value in backbone.items() if key != "name"]
    command = ["adapt", str(photos), "--out", str(out), "--backbone", backbone["name"], *words]
    command += [
        "nbd.dim=8",
        "nbd.warmup_steps=5",
        "train.epochs=6",
        "optim.warmup_epochs=1",
        "engine.workers=0",
    ]
    assert main(command) == 0
    assert "instance retrieval" in "".join(capfd.readouterr())
    # of the last one, should noise have come out worse than frozen
    (report,) = out.glob("adapt*/report.html")
    mask = (report.parent / "final.mask").read_bytes()
    assert main(command) == 0
    assert "finished: nothing is left to do" in "".join(capfd.readouterr())
    assert (report.parent / "final.mask").read_bytes() == mask
    # as if the first had come out better, and then as if all but the lowest had come out worse
    result = json.loads((report.parent / "result.json").read_text())
    for decision, folder in (("adapted", "adapt"), ("frozen", "adapt-lowest")):
        result["retrieval"]["decision"] = decision
        for name in ("adapt", "adapt-lower"):
            (out / name).mkdir(exist_ok=True)
            (out / name / "result.json").write_text(json.dumps(result))
            reach = str(RUNS[name])
            text = (report.parent / "config.yaml").read_text()
            text = text.replace(f"name: {report.parent.name}\n", f"name: {name}\n")
            text = re.sub(r"score_reach: \S+", f"score_reach: {reach}", text)
            (out / name / "config.yaml").write_text(text)
        for path in out.glob("adapt*/report.html"):
            path.unlink()
        assert main(command) == 0
        assert [path.parent.name for path in out.glob("adapt*/report.html")] == [folder]
    assert "optim.score_reach=0.1" in "".join(capfd.readouterr())
