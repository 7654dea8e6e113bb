"""A conversion that is killed, in whichever split, goes on where it was and gives the bytes of one that was
not.
"""

import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from data_prep import csv_manifest, image_folder, inaturalist, sun397, writer
from data_prep.image_folder import convert_image_folder
from selfmask_dist.data import open_source
from tests.support.published_trees import contents, inat, sun, tree

ROOT = Path(image_folder.__file__).parents[1]
SLOW = """
import importlib, sys, time
from data_prep import writer
encode = writer._encode
def slow(*arguments):
    time.sleep(0.05)
    return encode(*arguments)
writer._encode = slow
sys.exit(importlib.import_module(sys.argv[1]).main(sys.argv[2:]))
"""


def layout(name: str, root: Path) -> tuple[Any, list[str]]:
    """Two splits as published, small; (the converter, its arguments, with OUT for the output)."""
    src = root / "src"
    if name == "image folder":
        tree(src / "train", 8)
        tree(src / "test", 8)
        return image_folder, [str(src), "OUT"]
    if name == "CSV":
        tree(src, 16)
        lines = [f"class{n % 3}/{n:03d}.jpg,{n % 3},{'train' if n < 8 else 'val'}\n" for n in range(16)]
        (root / "list.csv").write_text("path,label,split\n" + "".join(lines))
        return csv_manifest, [str(root / "list.csv"), str(src), "OUT"]
    if name == "SUN397":
        sun(src, 8)
        return sun397, [str(src), "OUT", "--partition", "2"]
    year = 2017 if "2017" in name else 2021
    lists = [f"--{split}={inat(src, year, split, 8)}" for split in ("train", "val")]
    if "archive" in name:
        archive = root / "images.tar.gz"
        with tarfile.open(archive, "w:gz") as tar:
            for folder in sorted(path for path in src.iterdir() if path.is_dir()):
                tar.add(folder, folder.name)
        src = archive
    return inaturalist, [str(src), "OUT", *lists]


@pytest.mark.parametrize(
    ("name", "splits_begun"),
    [
        pytest.param("image folder", 1, marks=pytest.mark.slow),
        ("image folder", 2),
        ("CSV", 2),
        ("SUN397", 1),
        pytest.param("SUN397", 2, marks=pytest.mark.slow),
        ("iNaturalist 2017", 1),
        pytest.param("iNaturalist 2017, archive", 2, marks=pytest.mark.slow),
        ("iNaturalist 2021", 2),
        pytest.param("iNaturalist 2021, archive", 1, marks=pytest.mark.slow),
    ],
)
def test_a_killed_conversion_goes_on_where_it_was(
    name: str, splits_begun: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, arguments = layout(name, tmp_path)
    whole, out = tmp_path / "whole", tmp_path / "out"

    def command(target: Path) -> list[str]:
        return [str(target) if a == "OUT" else a for a in (*arguments, "--max-samples-per-shard", "2")]

    assert module.main(command(whole)) == 0
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, module.__name__, *command(out)], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while len({report.parent for report in out.rglob(".shard-*.tar.report")}) < splits_begun:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not list(out.rglob("shard-*")), "nothing is to be seen before all is there"
    finished = len(list(out.rglob(".shard-*.tar.report")))
    encoded: list[object] = []
    encode = writer._encode

    def counting(*given: Any) -> Any:
        encoded.append(given)
        return encode(*given)

    monkeypatch.setattr(writer, "_encode", counting)
    assert module.main(command(out)) == 0
    splits = [path.name for path in whole.iterdir()]
    total = sum(len(open_source(out / split)) for split in splits)
    assert len(encoded) == total - 2 * finished > 0, "finished shards are not made again"
    for split in splits:
        assert contents(out / split) == contents(whole / split)


def test_a_kill_while_shards_get_their_names_loses_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree(tmp_path / "src", 6)
    out = tmp_path / "out"
    rename = Path.rename

    def die_at_the_second(self: Path, target: Path) -> Path:
        if target.name == "shard-000001.tar":
            raise KeyboardInterrupt  # nothing is cleaned up after it, as after a kill
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", die_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            convert_image_folder(tmp_path / "src", out, progress=False, max_samples_per_shard=2)
    with pytest.raises(ValueError, match="is not empty"):
        convert_image_folder(tmp_path / "src", out, progress=False, max_samples_per_shard=2)
    convert_image_folder(tmp_path / "src", out, progress=False, max_samples_per_shard=2, overwrite=True)
    assert len(open_source(out)) == 6
    assert not [name for name in contents(out) if name.startswith(".")]
