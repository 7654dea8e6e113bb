"""Preflight: what fails late is said at once, each with its way out."""

import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from launchers import preflight as checks
from launchers.preflight import preflight
from selfmask_dist.config import load_config, to_yaml


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "0.tar").touch()
    monkeypatch.setattr(
        shutil, "which", lambda name: None if name == "no-such-program" else f"/usr/bin/{name}"
    )
    monkeypatch.setattr(checks, "_partitions", lambda: {"low*": 4, "big": 16})
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    return [f"data.{split}={tmp_path / split}" for split in ("train", "test")] + [
        f"run.dir={tmp_path / 'runs'}"
    ]


def complain(settings: list[str], *more: str, cluster: str = "local", num_nodes: int = 2) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the caller looks at the message)
        preflight(load_config(None, [*settings, *more]), cluster=cluster, num_nodes=num_nodes)
    return str(caught.value)


@pytest.mark.parametrize("cluster", ["local", "slurm"])
def test_nothing_is_said_of_what_is_fine(settings: list[str], cluster: str) -> None:
    preflight(load_config(None, settings), cluster=cluster, num_nodes=4)


@pytest.mark.parametrize(
    ("cluster", "override", "complaint"),
    [
        ("local", "data.train=null", "data.train is not set"),
        ("local", "data.test=null", "data.test is not set"),
        ("local", "data.test=nowhere", "data.test: there is no nowhere"),
        ("local", "data.train={empty}", "has no tars in it"),
        ("local", "backbone.weights=nowhere.safetensors", "there is no file nowhere.safetensors"),
        ("local", "launch.container=[no-such-program]", "there is no program no-such-program"),
        ("local", "launch.environment={{1A: x}}", "'1A' is not the name of a variable"),
        ("local", "run.wandb=online", "set run.wandb=offline"),
        ("local", "train.global_batch_size=65", "set train.global_batch_size=64"),
        ("local", "launch.processes_per_node=3", "not divisible by 6 processes"),
        ("local", "train.accumulate=33", "leaves micro-steps without an image"),
        ("local", "run.dir={file}", "is a file; set run.dir to a folder"),
        ("slurm", "launch.hours=0.1", "save more often"),
        ("slurm", "launch.signal_seconds=60", "launch.signal_seconds=60 leaves less than"),
        ("slurm", "checkpoint.stop_seconds=100", "checkpoint.stop_seconds=100 for saving"),
        ("slurm", "launch.signal_seconds=90000", "told to stop at once"),
        ("slurm", "launch.partition=huge", "there are big, low"),
        ("slurm", "engine.device=cuda", "set launch.gpus_per_node"),
        ("slurm", "launch.processes_per_node=0", "launch.gpus_per_node is not set"),
    ],
)
def test_one_thing_wrong(
    settings: list[str], tmp_path: Path, cluster: str, override: str, complaint: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    override = override.format(empty=tmp_path / "empty", file=tmp_path / "file")
    said = complain(settings, override, cluster=cluster)
    assert complaint in said
    assert len(said.splitlines()) == 1


def test_several_things_wrong_are_said_together(settings: list[str]) -> None:
    said = complain(settings, "data.train=nowhere", "train.global_batch_size=65")
    assert "nowhere" in said
    assert "65" in said


def test_more_nodes_than_there_are(settings: list[str]) -> None:
    assert "partition low has 4" in complain(settings, cluster="slurm", num_nodes=8)
    assert "partition big has 16" in complain(settings, "launch.partition=big", cluster="slurm", num_nodes=32)


def test_no_sbatch(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "--cluster local" in complain(settings, cluster="slurm")


def test_a_port_that_is_taken(settings: list[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert "Address already in use" in complain(settings, f"launch.master_port={port}")


def test_a_folder_that_cannot_be_written(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    assert "is not writable" in complain(settings)


def test_a_full_disk(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert "less than 1 GiB is free" in complain(settings)


def test_an_earlier_run(settings: list[str], tmp_path: Path) -> None:
    run = tmp_path / "runs" / "run"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(load_config(None, settings)))
    assert "run.resume=true" in complain(settings)
    preflight(load_config(None, [*settings, "run.overwrite=true"]), cluster="local", num_nodes=2)
    preflight(load_config(None, [*settings, "run.resume=true"]), cluster="local", num_nodes=2)
    assert "was started with seed=0 and not 1" in complain(settings, "run.resume=true", "seed=1")
