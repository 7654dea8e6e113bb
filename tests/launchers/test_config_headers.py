"""What the header of a published configuration says: its command with --dry-run, and the reckoned time."""

import re
import shlex
from pathlib import Path

import pytest

from launchers.submit import main
from selfmask_dist.cli.plan.hardware import Hardware
from selfmask_dist.cli.plan.short import reckon
from selfmask_dist.config import load_config

ROOT = Path(__file__).resolve().parents[2]
ALL = sorted((ROOT / "configs").rglob("*.yaml"))
FIRST = [path for path in ALL if "methods" not in path.parts]  # the others are as many again, and slow
_OTHERS = [pytest.param(path, marks=pytest.mark.slow) for path in ALL if path not in FIRST]


def header(path: Path) -> str:
    """The comment that a file begins with, its signs left out."""
    lines = path.read_text(encoding="utf-8").partition("\n# ---- ")[0].splitlines()
    return "\n".join(line.removeprefix("#").strip() for line in lines)


def command(path: Path) -> list[str]:
    """The words behind `python` of the header's command, without what stands in brackets."""
    found = re.search(r"^command +python ((?:.*\\\n)*.*)", header(path), re.MULTILINE)
    assert found is not None, path
    return shlex.split(re.sub(r"\[.*?\]", "", found[1].replace("\\\n", " ")))


def dry_run(path: Path) -> list[str]:
    """What the header says is to be written behind the command."""
    found = re.search(r"^dry run +the same with (.*?):", header(path), re.MULTILINE)
    assert found is not None, path
    return shlex.split(found[1])


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout without runs and data, on a machine without SLURM, GPU and site file."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for name in ("SELFMASK_SITE", "SELFMASK_DATA", "SLURM_CONF", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.mark.parametrize("path", [*FIRST, *_OTHERS], ids=lambda path: path.stem)
def test_the_command_of_a_header_with_dry_run(
    path: Path, bare: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program, *words = command(path)
    assert (program, words[2:4]) == ("launchers/submit.py", ["--config", str(path.relative_to(ROOT))])
    status = main([*words, *dry_run(path), "--plan-seconds=0"])
    shown = capsys.readouterr()
    assert status == 0, shown.err
    assert f"#SBATCH --nodes={words[1]}" in shown.out
    assert f"name: {load_config(path).backbone.name}" in shown.out
    assert sorted(file.name for file in bare.iterdir()) == ["bin", "configs"], "nothing is written"


@pytest.mark.parametrize(
    "path",
    [
        path if path.stem == "supervised_rn18" else pytest.param(path, marks=pytest.mark.slow)
        for path in ALL
        if path.stem != "debug_cascade"
    ],
    ids=lambda path: path.stem,
)
def test_the_reckoned_time_of_a_header_is_the_planners(path: Path) -> None:
    found = re.search(
        r"^reckoned +8 H100s, ([\d,]+) pictures: (.*?)(?: for each training)? \((.*)\)$",
        header(path),
        re.MULTILINE,
    )
    assert found is not None, path
    pictures, hours, mark = found.groups()
    assert "not measured" in mark
    hardware = Hardware(pictures=int(pictures.replace(",", "")), gpus_per_node=8)
    assert reckon(load_config(path), hardware).hours == hours
