"""Preflight: what fails late is said at once, each with its way out."""

import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from launchers import preflight as checks
from launchers.preflight import preflight
from launchers.site import Partition
from selfmask_dist.config import load_config, to_yaml


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Overrides of a run that nothing is wrong with."""
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "0.tar").touch()
    monkeypatch.setattr(
        shutil, "which", lambda name: None if name == "no-such-program" else f"/usr/bin/{name}"
    )
    nodes = {"low": 4, "big": 16, "one": 1}
    partitions = [Partition(name, n, 8, 32, 0, None, is_default=name == "low") for name, n in nodes.items()]
    monkeypatch.setattr(checks, "read_partitions", lambda: partitions)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    return [f"data.{split}={tmp_path / split}" for split in ("train", "test")] + [
        f"run.dir={tmp_path / 'runs'}"
    ]


@pytest.fixture
def places(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dict[str, object]]:
    """What is not as it should be, by the name that a case's override calls it."""
    for name in ("empty", "locked", "full", "runs/earlier"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "file").touch()
    (tmp_path / "pointer.pth").write_text("version https://git-lfs.github.com/spec/v1")
    (tmp_path / "half.safetensors").write_bytes((1000).to_bytes(8, "little") + b'{"a":')
    (tmp_path / "runs/earlier/config.yaml").write_text(to_yaml(load_config(None, settings)))
    may, usage = os.access, shutil.disk_usage
    monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path) and may(path, mode))
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: SimpleNamespace(free=1000) if "full" in str(path) else usage(path)
    )
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield {"here": tmp_path, "port": taken.getsockname()[1]}


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
        ("local", "data.test=no/where", "data.test: there is no no/where"),
        ("local", "data.train={here}/empty", "has no tars and no pictures in it"),
        ("local", "data.subset=nowhere.npy", "there is no file nowhere.npy"),
        ("local", "backbone.weights=nowhere.safetensors", "there is no file nowhere.safetensors"),
        ("local", "backbone.weights={here}/pointer.pth", "is neither safetensors nor what torch.save writes"),
        ("local", "backbone.weights={here}/half.safetensors", "half a download?"),
        ("local", "mask.init_from={here}/empty", "name the folder of a finished run"),
        ("local", "launch.container=[no-such-program]", "there is no program no-such-program"),
        ("local", "launch.environment={{1A: x}}", "'1A' is not the name of a variable"),
        ("local", "launch.master_port={port}", "Address already in use"),
        ("local", "run.wandb=online", "set run.wandb=offline"),
        ("local", "train.global_batch_size=65", "set train.global_batch_size=64"),
        ("local", "launch.processes_per_node=3", "not divisible by 6 processes"),
        ("local", "train.accumulate=33", "leaves micro-steps without an image"),
        ("local", "objective.name=swav swav.queue_length=513", "set it to 512"),
        (
            "local",
            "method=cascade objective.name=swav cascade.router=kmeans cascade.clusters=[3,5]",
            "only cascade.router=gmm can choose",
        ),
        ("local", "run.dir={here}/file", "is a file; set run.dir to a folder"),
        ("local", "run.dir={here}/locked", "is not writable"),
        ("local", "run.dir={here}/full", "less than 1 GiB is free"),
        ("local", "run.name=earlier", "run.resume=true"),
        ("local", "run.name=earlier run.resume=true seed=1", "was started with seed=0 and not 1"),
        ("slurm", "launch.hours=0.1", "save more often"),
        ("slurm", "launch.signal_seconds=60", "launch.signal_seconds=60 leaves less than"),
        ("slurm", "checkpoint.stop_seconds=100", "checkpoint.stop_seconds=100 for saving"),
        ("slurm", "launch.signal_seconds=90000", "told to stop at once"),
        ("slurm", "launch.partition=huge", "there are big, low, one"),
        ("slurm", "launch.partition=one", "--nodes 2: partition one has 1"),
        ("slurm", "engine.device=cuda", "set launch.gpus_per_node"),
        ("slurm", "launch.processes_per_node=0", "launch.gpus_per_node is not set"),
    ],
)
def test_one_thing_wrong(
    settings: list[str], places: dict[str, object], cluster: str, override: str, complaint: str
) -> None:
    overrides = re.split(r" (?=[\w.]+=)", override.format(**places))
    said = complain(settings, *overrides, cluster=cluster)
    assert complaint in said
    assert len(said.splitlines()) == 1


def test_several_things_wrong_are_said_together(settings: list[str]) -> None:
    said = complain(settings, "data.train=nowhere", "train.global_batch_size=65")
    assert "nowhere" in said
    assert "65" in said


def test_the_default_partition_is_the_one_with_a_star(settings: list[str]) -> None:
    assert "partition low has 4" in complain(settings, cluster="slurm", num_nodes=8)


def test_no_sbatch(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "--cluster local" in complain(settings, cluster="slurm")


def test_an_earlier_run_that_is_wanted(settings: list[str], places: dict[str, object]) -> None:
    for wanted in ("run.overwrite=true", "run.resume=true"):
        preflight(load_config(None, [*settings, "run.name=earlier", wanted]), cluster="local", num_nodes=2)


def test_the_patch_of_an_open_clip_tower_is_that_of_its_arguments(settings: list[str]) -> None:
    tower = [
        "backbone.name=open_clip:ViT-B-32-quickgelu",
        "backbone.pretrained=false",
        "backbone.image_size=16",
    ]
    preflight(
        load_config(None, [*settings, *tower, "backbone.kwargs={vision_cfg: {patch_size: 4}}"]),
        cluster="local",
        num_nodes=1,
    )
    with pytest.raises(ValueError, match=r"backbone\.image_size=16 is not a multiple of 5"):
        preflight(
            load_config(None, [*settings, *tower, "backbone.kwargs={vision_cfg: {patch_size: 5}}"]),
            cluster="local",
            num_nodes=1,
        )


def test_a_dry_run_notes_weights_that_another_machine_may_have(
    settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(None, [*settings, "backbone.weights=elsewhere.safetensors"])
    preflight(config, cluster="local", num_nodes=1, is_dry=True)
    assert "note: backbone.weights: there is no file elsewhere.safetensors" in capsys.readouterr().err
    with pytest.raises(ValueError, match="there is no file elsewhere"):
        preflight(config, cluster="local", num_nodes=1)
