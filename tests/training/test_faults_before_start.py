"""What cannot work, or would be passed over, is said before anything is measured; the name stays free."""

from pathlib import Path

import pytest
from torch import nn

from launchers import preflight as checks
from launchers.preflight import preflight
from selfmask_dist.cli import main
from selfmask_dist.config import load_config
from selfmask_dist.evals.measure import neighbours_to_measure
from selfmask_dist.runs.folder import check_start
from selfmask_dist.training.build import check_neighbours
from tests.support.tiny_run import events_of, submit, write_config, write_tiny_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_tiny_data(tmp_path_factory.mktemp("data"))


TWO_CROPS = "objective.name=simclr crops.local_count=0 crops.global_count=2"


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (
            "backbone.image_size=21",
            "backbone.image_size=21 is not a multiple of 8, the patch size of timm:vit_tiny",
        ),
        ("backbone.image_size=15", "Set backbone.image_size to 8 or 16"),
        (f"{TWO_CROPS} crops.global_size=20", "crops.global_size=20 is not a multiple of 8"),
        ("eval.knn_k=[5,49]", "eval.knn_k has 49, and the bank is the 48 images of data.train"),
        ("eval.knn_k=[30] eval.knn_every=1 eval.monitor_samples=20", "that bank has 20 images"),
        ("method=cascade objective.name=swav eval.knn_k=[1000]", "eval.knn_k has 1000"),
        ("method=probe eval.knn_k=[1000] eval.final=false", "eval.knn_k has 1000"),
        ("backbone.name=timm:vit_tinny_patch16_224", "vit_tiny_patch16_224"),
        ("mask.include=['layers.*.weight']", "include 'layers.*.weight' matches no parameter"),
        ("mask.exclude=['*.bais']", "exclude '*.bais' matches no parameter"),
        (
            "method=cascade objective.name=swav mask.include=['nothing']",
            "include 'nothing' matches no parameter",
        ),
    ],
)
def test_it_is_refused_by_name_and_the_name_stays_free(
    overrides: str,
    complaint: str,
    tmp_path: Path,
    data: dict[str, str],
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = write_config(tmp_path / "tiny.yaml", data, eval={"frozen_baseline": True})
    assert main(["train", "--config", str(path), "run.name=a", *overrides.split(" ")]) == 2
    said = capfd.readouterr().err
    assert complaint in said
    assert "Traceback" not in said
    assert "frozen backbone: " not in said  # nothing was measured
    check_start(load_config(path, ["run.name=a"]))  # would raise where the name is taken


@pytest.mark.slow
def test_a_launched_start_that_fails_leaves_its_log_and_the_name(
    tmp_path: Path, data: dict[str, str]
) -> None:
    path = write_config(tmp_path / "tiny.yaml", data, launch={"snapshot": False})
    keys = ["run.name=a", "train.max_steps=1"]
    failed = submit(path, *keys, "mask.include=['nothing']", nodes=2)
    assert failed.returncode == 2
    assert "matches no parameter" in failed.stderr
    assert (tmp_path / "a" / "logs" / "rank-0.log").exists()
    again = submit(path, *keys, nodes=1)
    assert again.returncode == 0, again.stderr


def test_a_run_that_has_trained_is_never_forgotten(tmp_path: Path, data: dict[str, str]) -> None:
    path = write_config(tmp_path / "tiny.yaml", data)
    keys = ["train", "--config", str(path), "run.name=a", "train.max_steps=2", "checkpoint.every_steps=1"]
    assert main(keys) == 0
    (tmp_path / "a" / "result.json").unlink()
    assert main([*keys, "run.resume=true", "backbone.weights=nowhere.pth"]) == 2
    assert main([*keys]) == 2
    assert (tmp_path / "a" / "config.yaml").exists()
    assert (tmp_path / "a" / "checkpoints" / "latest").exists()


def test_of_the_default_neighbours_those_that_do_not_fit_are_left_out_and_said() -> None:
    default = load_config(None, [])
    assert neighbours_to_measure(default, 150) == (20,)
    (note,) = check_neighbours(default, 150)
    assert note == "k-NN with k=200, a default of eval.knn_k, is left out: data.train has 150 images"
    assert check_neighbours(default, 200) == []
    asked = load_config(None, ["eval.knn_k=[10,200]"])
    assert neighbours_to_measure(asked, 150) == (10, 200)
    with pytest.raises(ValueError, match=r"eval\.knn_k has 200"):
        check_neighbours(asked, 150)


def test_fewer_images_than_neighbours_are_fine_where_nothing_is_measured() -> None:
    quiet = ["eval.final=false", "eval.frozen_baseline=false", "eval.knn_every=0", "eval.knn_k=[200]"]
    check_neighbours(load_config(None, quiet), 10)
    check_neighbours(load_config(None, ["eval.knn_k=[200]"]), 200)


def test_classes_without_a_training_picture_are_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = write_tiny_data(tmp_path / "full")
    other = write_tiny_data(tmp_path / "few", train=2)  # red and green alone
    path = write_config(
        tmp_path / "tiny.yaml", {**data, "train": other["train"]}, train={"global_batch_size": 2}
    )
    status = main(["train", "--config", str(path), "run.name=a", "eval.knn_k=[1]", "train.epochs=1"])
    said = capfd.readouterr().err
    assert "blue" in said
    if status == 0:
        assert [event["text"] for event in events_of(tmp_path / "a") if event["event"] == "note"]


@pytest.mark.parametrize(
    ("gpus", "overrides", "complaint"),
    [
        (
            [],
            "launch.gpus_per_node=8 engine.device=auto",
            "launch.gpus_per_node=8 is asked for, and this is one machine, and it has 0",
        ),
        (
            ["0"],
            "launch.gpus_per_node=2 launch.processes_per_node=2 engine.device=auto",
            "it has 1. Leave it out",
        ),
        (["0", "1"], "launch.gpus_per_node=2 engine.device=cpu", "engine.device=cpu uses none"),
        (["0", "1"], "launch.gpus_per_node=2 engine.device=auto", "set launch.processes_per_node=2"),
        (
            [],
            "backbone.name=open_clip:ViT-B-32 backbone.image_size=100 backbone.kwargs={}",
            "not a multiple of 32",
        ),
        ([], "backbone.image_size=100 backbone.kwargs={patch_size: 8}", "set it to 96 or 104"),
    ],
)
def test_launchers_say_what_a_configuration_alone_tells(
    gpus: list[str],
    overrides: str,
    complaint: str,
    tmp_path: Path,
    data: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checks, "visible_gpus", lambda: gpus)
    path = write_config(tmp_path / "tiny.yaml", data)
    keys = overrides.replace("patch_size: ", "patch_size:~").split(" ")
    config = load_config(path, [key.replace(":~", ": ") for key in keys])
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is looked at)
        preflight(config, cluster="local", num_nodes=1)
    assert complaint in str(caught.value)


def test_patches_are_of_those_that_cut_images_into_them() -> None:
    from selfmask_dist.backbones.inputs.patches import _patch_size

    class Cuts(nn.Module):
        patch_size = (14, 14)

        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Conv2d(3, 4, 14, stride=14)

    assert _patch_size(nn.Sequential(Cuts())) == 14
    assert _patch_size(nn.Conv2d(3, 4, 3)) == 1


@pytest.mark.parametrize(
    "overrides",
    [
        "backbone.image_size=32 train.global_batch_size=1",
        "backbone.image_size=16 train.global_batch_size=2 train.accumulate=2",
    ],
)
def test_one_image_for_batch_normalisation_is_a_named_error(
    overrides: str, tmp_path: Path, data: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path / "tiny.yaml", data)
    resnet = ["backbone.name=timm:test_resnet", "backbone.kwargs={}"]
    keys = ["run.name=a", "train.max_steps=1", *resnet, *overrides.split(" ")]
    status, said = main(["train", "--config", str(path), *keys]), capfd.readouterr().err
    assert "Traceback" not in said
    assert status == 2
    assert "this process has 1 image(s) in a micro-step. Raise train.global_batch_size" in said
