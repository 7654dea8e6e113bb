"""`selfmask launch`, `configs` and `data convert`: the commands that wrap what lies beside the package."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from selfmask_dist.cli import main
from selfmask_dist.cli.configs import summary
from selfmask_dist.common.shipped import shipped_configs
from selfmask_dist.data import open_source
from tests.support.published_trees import tree

ROOT = Path(__file__).resolve().parents[2]


def test_configs_lists_each_with_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, path in shipped_configs().items():
        (line,) = [line for line in lines if line.split(" ")[0] == name]
        assert line.endswith(summary(path))
        assert len(summary(path)) > 10
    assert summary(shipped_configs()["cascade_vitb32"]).endswith("five experts, each by nbd")


def test_launch_is_the_launcher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "0.tar").touch()
    data = [f"data.{split}={tmp_path / split}" for split in ("train", "test")]
    options = ["--dry-run", "--plan-seconds=0", "--cluster=local", "--config=debug_cascade", "--nodes=2"]
    assert main(["launch", *options, *data, f"run.dir={tmp_path}"]) == 0
    shown = capsys.readouterr().out
    assert f"--config={ROOT / 'configs' / 'debug_cascade.yaml'}" in shown, "a node reads the same file"
    assert "RANK=1" in shown
    assert main(["launch", *options, f"run.dir={tmp_path}"]) == 0, "another machine has the data"
    assert "note: data.train is not set" in capsys.readouterr().err
    assert main(["launch", *options[1:], f"run.dir={tmp_path}"]) == 2
    assert "error: data.train is not set" in capsys.readouterr().err


def test_convert_takes_the_converters_own_arguments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree(tmp_path / "src", 6)
    out = tmp_path / "out"
    convert = ["data", "convert", "folder", str(tmp_path / "src"), str(out)]
    assert main([*convert, "--max-samples-per-shard", "4", "--split", "val"]) == 0
    assert len(open_source(out / "val")) == 6
    assert main([*convert[:3], "absent", str(out)]) == 2
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["data", "convert", "inaturalist", "--help"])
    assert ended.value.code == 0
    assert "usage: selfmask data convert inaturalist" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["data", "convert", "zip", "a", "b"])
    assert "folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "script", ["image_folder", "csv_manifest", "inaturalist", "sun397", "torchvision_dataset"]
)
def test_converters_are_started_by_their_paths(script: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "data_prep" / f"{script}.py"), "--help"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"usage: {script}.py" in done.stdout
