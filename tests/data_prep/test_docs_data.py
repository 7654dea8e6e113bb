"""Each command of docs/data.md, as it stands there, on a small tree of the kind that it is for."""

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from scipy import io as scipy_io  # type: ignore[import-untyped]

from selfmask_dist import cli
from selfmask_dist.data import open_source
from tests.support.published_trees import inat, save, sun, tree
from tests.support.tars import numbered_tars

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
TINY = (
    "backbone.name=timm:vit_tiny_patch16_224 backbone.pretrained=false backbone.image_size=16"
    " 'backbone.kwargs={patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}' train.epochs=1"
    " train.global_batch_size=4 eval.knn_k=[2] eval.frozen_baseline=false eval.probe=false"
    " engine.device=cpu engine.workers=0 engine.threads=1 run.progress=false"
)


def five_minutes() -> list[str]:
    """The lines of the first block, without what they say behind a #."""
    section = TEXT.split("## Five minutes")[1].split("\n## ")[0]
    return [line.split("#")[0].strip() for line in section.splitlines() if line.startswith("    ")]


def one_liners() -> list[str]:
    """The commands with arguments inside sentences and tables."""
    return re.findall(r"`(selfmask data \w+ [^`]*)`", TEXT)


def run(command: str) -> None:
    program, *arguments = shlex.split(command)
    assert program == "selfmask", command
    assert cli.main(arguments) in (0, None), command


def pictures(folder: Path) -> None:
    for split in ("train", "test"):
        tree(folder / "PICTURES" / split, 8)


def inaturalist(folder: Path) -> None:
    for split in ("train", "val"):
        shutil.move(inat(folder / "IMAGES", 2021, split), folder / f"{split}.json")


def sun397(folder: Path) -> None:
    sun(folder / "SUN397")
    (folder / "PARTITIONS").mkdir()
    for kind in ("Training", "Testing"):
        shutil.move(folder / "SUN397" / f"{kind}_02.txt", folder / "PARTITIONS" / f"{kind}_01.txt")


def listed(folder: Path) -> None:
    save(folder / "IMAGES" / "0.jpg", 0)
    (folder / "LIST.csv").write_text("path,label\n0.jpg,cat\n")


def flowers(folder: Path) -> None:
    root = folder / "ROOT" / "flowers-102"
    for n in range(1, 7):
        save(root / "jpg" / f"image_{n:05d}.jpg", n)
    scipy_io.savemat(root / "imagelabels.mat", {"labels": [[1, 2, 1, 2, 1, 2]]})
    scipy_io.savemat(root / "setid.mat", {"trnid": [[1, 2]], "valid": [[3, 4]], "tstid": [[5, 6]]})


def foreign_tars(folder: Path) -> None:
    (folder / "FOLDER").mkdir()
    numbered_tars(folder / "FOLDER")


def indexed_tars(folder: Path) -> None:
    foreign_tars(folder)
    run("selfmask data index FOLDER")


TREES: dict[str, Callable[[Path], None]] = {
    "convert folder SRC": lambda folder: tree(folder / "SRC", 8),
    "convert inaturalist": inaturalist,
    "convert sun397": sun397,
    "convert csv": listed,
    "convert torchvision Flowers102": flowers,
    "data index FOLDER": foreign_tars,
    "data verify FOLDER": indexed_tars,
}


def test_the_first_five_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path)
    *prepare, train = five_minutes()
    assert len(prepare) == 4
    for command in prepare:
        run(command)
    assert [len(open_source(tmp_path / "tars" / "pets" / split)) for split in ("train", "test")] == [8, 8]
    options = "--short-side 256 --quality 90 --num-workers 8 --skip-broken"
    assert all(option in TEXT for option in options.split() if option.startswith("--"))
    run(prepare[0].replace("tars/pets", "tars/small") + " " + options)
    assert train.endswith(" ...")
    run(train.replace("...", TINY))


@pytest.mark.parametrize("command", one_liners())
def test_each_command(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import Flowers102  # type: ignore[import-untyped]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Flowers102, "_check_integrity", lambda self: True)
    (make,) = [make for name, make in TREES.items() if name in command]
    make(tmp_path)
    run(command)
    run(command.replace(" OUT", " OTHER") if " OUT" in command else command)


def test_every_command_is_found() -> None:
    found = [name for name in TREES if any(name in command for command in one_liners())]
    assert found == list(TREES)
