"""Jobs of SLURM without SLURM: arrays, containers, one log for each node."""

import re
import sys
from pathlib import Path

import pytest

from launchers import local, slurm
from launchers.array import check_array
from launchers.preflight import preflight
from selfmask_dist.cli import main
from selfmask_dist.config import load_config
from tests.support.tiny_run import submit, write_config, write_tiny_data


@pytest.fixture(scope="module")
def config_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("jobs")
    return write_config(folder / "tiny.yaml", write_tiny_data(folder / "data"))


def test_runs_as_the_tasks_of_one_array(config_path: Path) -> None:
    options = ("--dry-run", "--plan-seconds=0", "--array")
    done = submit(config_path, *options, "--seeds=3,4,5", cluster="slurm")
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^#SBATCH --(array=.*|nodes=.*)$", done.stdout, re.MULTILINE) == [
        "array=0-2%3",
        "nodes=2",
    ]
    assert f"PYTHONPATH={config_path.parent / 'run-seed3' / 'code'}" in done.stdout
    assert re.findall(r"^seed: (\d)", done.stdout, re.MULTILINE) == ["3", "4", "5"]

    def check(*launches: str) -> None:
        words = [[f"run.name=r{k}", *launch.split()] for k, launch in enumerate(launches)]
        check_array([load_config(config_path, own) for own in words])

    check("launch.gpus_per_node=2", "launch.gpus_per_node=2")
    for launches, said in {
        ("",): "give --seeds",
        ("", "launch.hours=9"): "launch.hours of r1 is not that of r0",
        ("launch.requeue=chain", "launch.requeue=chain"): "no next job",
    }.items():
        with pytest.raises(ValueError, match=said):
            check(*launches)


def test_each_task_of_an_array_has_nccl_write_into_its_own_run(config_path: Path, tmp_path: Path) -> None:
    config = load_config(config_path, ["launch.gpus_per_node=2"])
    stacks = slurm.own_stacks(config, tmp_path / "run-seed1")
    assert stacks is not None
    assert stacks.is_dir()
    assert local.recorder_file(stacks) == f"{tmp_path}/run-seed1/stacks/nccl-rank-"
    assert slurm.own_stacks(load_config(config_path), tmp_path / "run-seed1") is None
    said = load_config(
        config_path, ["launch.gpus_per_node=2", "launch.environment={TORCH_FR_DUMP_TEMP_FILE: /x}"]
    )
    assert slurm.own_stacks(said, tmp_path / "run-seed1") is None


def test_above_64_ranks_a_node_has_one_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def of(rank: int, num_ranks: int) -> str:
        return local.log_path(tmp_path, rank, num_ranks=num_ranks, per_node=8).name

    assert [of(rank, 64) for rank in (0, 63)] == ["rank-0.log", "rank-63.log"]
    names = [of(rank, 72) for rank in range(72)]
    assert len(set(names)) == 1 + 9
    assert (names[0], names[1], names[8], names[71]) == (
        *("rank-0.log", "ranks-0-7.log", "ranks-8-15.log", "ranks-64-71.log"),
    )
    logs = tmp_path / "run" / "logs"
    logs.mkdir(parents=True)
    for name in set(names):
        (logs / name).write_text(f"of {name}\n")
    for rank in (0, 7, 8, 71):
        assert main(["logs", str(logs.parent), "--rank", str(rank)]) == 0
        assert capsys.readouterr().out == f"of {names[rank]}\n"
    assert main(["logs", str(logs.parent), "--rank", "72"]) == 2
    assert "there are ranks 0, 0-7, 8-15" in capsys.readouterr().err


def test_a_container_has_a_python_of_its_own(config_path: Path) -> None:
    container = ("apptainer", "exec", "image.sif")
    task = slurm.TrainTask(("seed=1",), Path("logs"), container, python="python")
    assert task.command({}) == [*container, "python", "-m", "selfmask_dist.cli", "train", "seed=1"]
    assert slurm.TrainTask((), Path("logs")).command({})[0] == sys.executable
    with pytest.raises(ValueError, match=r"inside of launch\.container, and that is not set"):
        preflight(load_config(config_path, ["launch.container_python=python"]), cluster="slurm", num_nodes=1)
