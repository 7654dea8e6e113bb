"""`selfmask site init`: what a cluster says of itself, with a `sinfo` that prints what real ones do."""

import os
from pathlib import Path

import pytest

from launchers.site import ask_cluster, describe_site, gpus_of, hours_of, read_partitions
from selfmask_dist.cli import main
from selfmask_dist.config import load_config
from selfmask_dist.config.config import load_with_places
from selfmask_dist.config.site import read_site


@pytest.mark.parametrize(
    ("gres", "number"),
    [
        ("gpu:8", 8),
        ("gpu:h100:8(S:0-1)", 8),
        ("nvme:1,gpu:a100:4(IDX:0-3)", 4),
        ("gpu", 1),
        ("(null)", 0),
        ("nvme:2", 0),
    ],
)
def test_gpus_of_a_node(gres: str, number: int) -> None:
    assert gpus_of(gres) == number


@pytest.mark.parametrize(
    ("limit", "hours"),
    [
        ("infinite", None),
        ("2-00:00:00", 48.0),
        ("1-12", 36.0),
        ("12:30:00", 12.5),
        ("30:00", 0.5),
        ("n/a", None),
    ],
)
def test_time_limits(limit: str, hours: float | None) -> None:
    assert hours_of(limit) == hours


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `sinfo` that answers as a cluster with a CPU partition, the default, and two kinds of GPU nodes."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "sinfo"
    program.write_text(
        "#!/bin/sh\n"
        "echo 'cpu*|100|128|512000|(null)|1-00:00:00'\n"
        "echo 'gpu|12|96+|1031000|gpu:h100:8(S:0-1)|2-00:00:00'\n"
        "echo 'gpu|4|64|515000|gpu:a100:4|2-00:00:00'\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    monkeypatch.delenv("SELFMASK_DATA", raising=False)
    return tmp_path


def test_what_a_cluster_says(cluster: Path) -> None:
    cpu, gpu = read_partitions()
    assert (cpu.name, cpu.nodes, cpu.gpus, cpu.is_default) == ("cpu", 100, 0, True)
    assert (gpu.nodes, gpu.gpus, gpu.cpus, gpu.hours) == (16, 4, 64, 48.0), "the least of its nodes"


def test_the_file_that_is_written_makes_a_run_ask_for_gpus(
    cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = cluster / "site.yaml"
    assert main(["site", "init", "--out", str(path)]) == 0
    assert "partition gpu: 16 node(s) of 4 GPUs" in capsys.readouterr().out
    launch = load_config(None, site=read_site(path)).launch
    assert (launch.partition, launch.gpus_per_node, launch.processes_per_node) == ("gpu", 4, 0)
    assert (launch.cpus_per_process, launch.hours) == (16, 24)
    assert load_config(None, site=read_site(path)).run.dir == f"{cluster}/selfmask/runs"
    assert main(["site", "init", "--out", str(path)]) == 2
    assert "is there already" in capsys.readouterr().err


def test_a_machine_without_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    text = describe_site()
    assert "no SLURM answers here" in text
    path = tmp_path / "site.yaml"
    path.write_text(text)
    assert load_config(None, site=read_site(path)).launch.partition is None


@pytest.mark.parametrize(
    ("overrides", "asked"),
    [
        ([], []),  # the default partition has none
        (
            ["launch.partition=gpu"],
            ["launch.gpus_per_node=4", "launch.processes_per_node=0", "launch.cpus_per_process=3"],
        ),
        (
            ["launch.partition=gpu", "engine.workers=40"],
            ["launch.gpus_per_node=4", "launch.processes_per_node=0", "launch.cpus_per_process=16"],
        ),
        (
            ["launch.partition=gpu", "launch.gpus_per_node=2"],
            ["launch.processes_per_node=0", "launch.cpus_per_process=3"],
        ),
        (["launch.partition=gpu", "engine.device=cpu"], []),
        (["launch.partition=elsewhere"], []),
    ],
)
def test_a_job_asks_for_what_its_partition_has(cluster: Path, overrides: list[str], asked: list[str]) -> None:
    config, said = load_with_places(None, overrides)
    assert ask_cluster(config, said, read_partitions()) == asked


def test_the_batch_script_asks_for_gpus_without_a_word_in_the_configuration(
    cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dry = ["launch", "--dry-run", "--plan-seconds=0", "--cluster=slurm", "--nodes=4", "launch.partition=gpu"]
    command = [*dry, "--config=cascade_vitb32", f"run.dir={cluster}"]
    assert main(command) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --gpus-per-node=4" in script or "#SBATCH --gres=gpu:4" in script
    assert "#SBATCH --ntasks-per-node=4" in script
    assert "#SBATCH --cpus-per-task=9" in script, "eight workers and the process itself"
    assert main([*command, "launch.gpus_per_node=null"]) == 2
    assert (
        "partition gpu has 4 GPUs a node and launch.gpus_per_node=null asks for none"
        in capsys.readouterr().err
    )
    assert main([*command, "launch.gpus_per_node=8"]) == 2
    assert "nodes of partition gpu have 4" in capsys.readouterr().err
