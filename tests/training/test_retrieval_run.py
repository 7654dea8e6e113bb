"""Runs that instance retrieval decides about: without labels, the state that is kept, the rate chosen."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from launchers.preflight import preflight
from selfmask_dist import apply_masks
from selfmask_dist.backbones import load_backbone
from selfmask_dist.cli import main
from selfmask_dist.cli.train import run
from selfmask_dist.config import ConfigError, load_config
from selfmask_dist.maskfile import MarkedMaskWarning, read_mask_file
from selfmask_dist.parallel import World
from selfmask_dist.runs.checkpoint import committed, read_checkpoint, step_of
from selfmask_dist.runs.verdict import closing
from selfmask_dist.training.meter import NonFiniteError
from selfmask_dist.training.retrieval.score_lr import choose, trial_config, with_chosen_score_lr
from tests.support.distributed import run_distributed
from tests.support.resuming import KEEP, cut_back, last_state, losses_of
from tests.support.tars import write_tar
from tests.support.tiny_run import write_config, write_tiny_data

SMALL = {"dim": 8, "hidden": 16}
MILD = {"local_count": 0, "blur": 0.0, "gray": 0.0, "color": 0.3, "global_scale": [0.35, 1.0]}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """60 pictures of random patches in a flat tar: no labels, no test split."""
    folder, rng, members = tmp_path_factory.mktemp("photos"), np.random.default_rng(0), []
    for index in range(60):
        patches = np.kron(rng.integers(0, 256, (4, 4, 3)), np.ones((4, 4, 1)))
        pixels = np.clip(patches + rng.normal(0, 10, (16, 16, 3)), 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        members.append((f"{index:03d}.png", buffer.getvalue()))
    write_tar(folder / "a.tar", members)
    return {"train": str(folder)}


def write(folder: Path, data: dict[str, str]) -> Path:
    return write_config(
        folder / "tiny.yaml",
        data,
        objective={"name": "simclr"},
        crops=MILD,
        simclr=SMALL,
        optim={"score_lr": 20.0, "head_lr": 0.05},
        eval={"knn_every": 1, "frozen_baseline": True},
        train={"epochs": 3, "global_batch_size": 12},
    )


def train(path: Path, *overrides: str) -> dict[str, Any]:
    return run(load_config(path, overrides))


def json_of(path: Path) -> Any:
    return json.loads(path.read_text())


# ---- what is measured, and what it decides


def test_a_run_without_labels_that_destroys_the_encoder_ends_with_the_frozen_backbone(
    tmp_path: Path, photos: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, photos)
    result = train(path, "run.name=a", "optim.score_lr=1e5")
    folder = tmp_path / "a"
    assert result == json_of(folder / "result.json")
    assert "k-NN and probe are left out, as data.test is not set" in capsys.readouterr().err
    found = result["retrieval"]
    assert found["decision"] == "frozen"
    assert found["pictures"] == 60
    assert found["difference"] < -0.05
    assert result["frozen"] == {"instance_retrieval": found["frozen"]} == json_of(folder / "frozen.json")
    assert result["adapted"] == {"instance_retrieval": found["adapted"]}
    hits = {what: np.array(one) for what, one in json_of(folder / "retrieval.json").items()}
    assert found["adapted"] == hits["adapted"].mean()
    error = (hits["adapted"] - hits["frozen"]).std(ddof=1) / 60**0.5
    assert found["standard_error"] == pytest.approx(error)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    monitored = {line["step"]: line[key] for line in lines if (key := "monitor/instance_retrieval") in line}
    assert list(monitored) == [5, 10, 15]
    assert monitored[15] == found["adapted"], "the same pictures and views each time"

    # the end of the run, the file and whoever puts it on say it
    text = closing(folder)
    assert "VERDICT: keep the frozen backbone: instance retrieval fell" in text
    assert "frozen 0.200 -> masked" in text
    file = read_mask_file(folder / "final.mask")
    assert file.verdict == result["verdict"][0]["text"]
    assert main(["inspect", str(folder / "final.mask")]) == 0
    assert f"VERDICT: {file.verdict}" in capsys.readouterr().out
    backbone = load_backbone(load_config(folder / "config.yaml").backbone, seed=0)
    with pytest.warns(MarkedMaskWarning, match="keep the frozen backbone"):
        apply_masks(backbone.encoder, folder / "final.mask")


def test_a_larger_bank_is_harder_for_the_same_pictures(tmp_path: Path, photos: dict[str, str]) -> None:
    path = write(tmp_path, photos)
    hits: dict[str | int, Any] = {}
    for bank in ("null", 60):
        more = ["eval.retrieval_samples=30", f"eval.retrieval_bank={bank}", "train.max_steps=1"]
        train(path, f"run.name=bank-{bank}", "eval.knn_every=0", "eval.final=false", *more)
        hits[bank] = np.array(json_of(tmp_path / f"bank-{bank}" / "retrieval.json")["frozen"])
    assert len(hits[60]) == len(hits["null"]) == 30
    assert 0 < hits[60].sum() < hits["null"].sum()
    assert (hits[60] <= hits["null"]).all(), "who is first among all is first among some"
    few = ["eval.retrieval_samples=10", "eval.retrieval_bank=45", "eval.final=false"]
    found = train(path, "run.name=bank-45", "eval.knn_every=0", "train.max_steps=1", *few)
    assert found["retrieval"]["pictures"] == 10
    assert found["retrieval"]["frozen"] > 0, "places in the bank are those of its pictures"


def test_labels_are_used_where_there_are_some(tmp_path: Path) -> None:
    data = write_tiny_data(tmp_path)
    path = write(tmp_path / "runs", data)
    short = ["train.max_steps=2", "eval.retrieval_samples=20", "eval.knn_every=0"]
    both = train(path, "run.name=both", *short)
    assert set(both["adapted"]) == {"instance_retrieval", "knn5"}
    assert both["retrieval"]["pictures"] == 20
    off = train(path, "run.name=off", "eval.retrieval=false", *short)
    assert set(off["adapted"]) == {"knn5"}
    assert "retrieval" not in off
    assert not (tmp_path / "runs" / "off" / "retrieval.json").exists()
    supervised = ["objective.name=supervised", *short]
    assert "retrieval" not in train(path, "run.name=supervised", *supervised)
    asked = train(path, "run.name=asked", "eval.retrieval=true", *supervised)
    assert set(asked["adapted"]) == {"instance_retrieval", "knn5", "head"}

    # a split that nobody labelled is one thing, a few labels that lack another
    unlabelled = tmp_path / "unlabelled"
    unlabelled.mkdir()
    pixels = io.BytesIO()
    Image.new("RGB", (16, 16), (9, 99, 9)).save(pixels, "PNG")
    members = [(f"{index}.png", pixels.getvalue()) for index in range(24)]
    write_tar(unlabelled / "a.tar", members)
    flat = [f"data.train={unlabelled}", f"data.test={unlabelled}"]
    found = train(path, "run.name=flat", *flat, *short)
    assert found["frozen"] == found["adapted"] == {"instance_retrieval": 0.0}, "all pictures are one"
    write_tar(unlabelled / "a.tar", [*members, ("z.cls", b"1"), ("z.png", pixels.getvalue())])
    with pytest.raises(ValueError, match="has no label"):
        train(path, "run.name=mixed", *flat, *short)


def test_a_run_that_needs_labels_still_asks_for_a_test_split(tmp_path: Path, photos: dict[str, str]) -> None:
    path = write(tmp_path, photos)
    with pytest.raises(ValueError, match=r"data\.test is not set"):
        train(path, "run.name=a", "objective.name=supervised")
    preflight(load_config(path, ["run.name=b"]), cluster="local", num_nodes=1)
    with pytest.raises(ValueError, match=r"data\.test is not set"):
        preflight(load_config(path, ["run.name=b", "method=frozen"]), cluster="local", num_nodes=1)


def result_of_rank(path: Path) -> dict[str, Any]:
    return train(path, "run.name=two", "train.keep=best")


@pytest.mark.distributed
def test_two_ranks_measure_what_one_does(tmp_path: Path, photos: dict[str, str]) -> None:
    path = write(tmp_path, photos)
    alone = train(path, "run.name=one", "train.keep=best")
    results = run_distributed(result_of_rank, 2, path, timeout=120, backend="")
    frozen = [json_of(tmp_path / name / "retrieval.json")["frozen"] for name in ("one", "two")]
    assert frozen[0] == frozen[1], "picture by picture"
    for result in results:
        assert result["retrieval"] == alone["retrieval"]
        assert result["kept_step"] == alone["kept_step"]
    assert (tmp_path / "one" / "final.mask").read_bytes() == (tmp_path / "two" / "final.mask").read_bytes()


# ---- the state that is kept


def test_the_best_state_is_kept_and_a_killed_run_keeps_the_same(
    tmp_path: Path, photos: dict[str, str]
) -> None:
    path, folder = write(tmp_path, photos), tmp_path / "a"
    overrides = ["run.name=a", "train.keep=best", "eval.knn_every=0.4", *KEEP]
    result = train(path, *overrides)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    monitored = {line["step"]: line[key] for line in lines if (key := "monitor/instance_retrieval") in line}
    assert len(monitored) == 7
    step = result["kept_step"]
    assert max(monitored, key=monitored.__getitem__) == step < 14
    assert result["retrieval"]["adapted"] == monitored[step]

    def scores_at(number: int) -> dict[str, torch.Tensor]:
        at = next(one for one in reversed(committed(folder / "checkpoints")) if step_of(one) == number)
        tensors = read_checkpoint(at).tensors
        return {key: one for key, one in tensors.items() if key.startswith("parameters/encoder.")}

    last = last_state(folder)
    for key, tensor in scores_at(step).items():
        assert torch.equal(last[key], tensor), "the newest checkpoint holds what the mask holds"
    bits = read_mask_file(folder / "final.mask").masks["default"].bits
    scores = scores_at(step)
    assert all(torch.equal(one, scores[f"parameters/encoder.{key}"] > 0) for key, one in bits.items())
    assert any(not torch.equal(one, last[key]) for key, one in scores_at(15).items())

    # killed after the best state, and between two measurements
    mask, losses = (folder / "final.mask").read_bytes(), losses_of(folder)
    cut_back(folder, step + 1)
    assert train(path, *overrides, "run.resume=true") == result
    assert (folder / "final.mask").read_bytes() == mask
    assert losses_of(folder) == losses
    again = last_state(folder)
    assert set(again) == set(last)
    assert all(torch.equal(again[key], tensor) for key, tensor in last.items())


# ---- the rate that is chosen


def test_the_rate_is_chosen_by_trials_that_are_made_once(tmp_path: Path, photos: dict[str, str]) -> None:
    path, folder = write(tmp_path, photos), tmp_path / "a"
    overrides = ["run.name=a", "optim.score_lr_choices=[1.0,20.0,100000.0]", "train.epochs=6"]
    result = train(path, *overrides)
    choice = result["score_lr"]
    assert choice == json_of(folder / "score_lr.json")
    assert [trial["score_lr"] for trial in choice["trials"]] == [1.0, 20.0, 1e5]
    assert choice["score_lr"] in (1.0, 20.0)
    assert choice["trials"][2]["instance_retrieval"] < choice["trials"][0]["instance_retrieval"]
    trial = json_of(folder / "trial-20" / "result.json")
    assert trial["steps"] == 3, "a tenth of 30"
    assert set(trial["adapted"]) == {"instance_retrieval"}
    train(path, "run.name=b", "train.epochs=6", f"optim.score_lr={choice['score_lr']}")
    assert (folder / "final.mask").read_bytes() == (tmp_path / "b" / "final.mask").read_bytes()

    # killed in the last trial: the others are found, and the end is the same
    made = (folder / "trial-1" / "result.json").stat().st_mtime_ns
    for name in ("checkpoints", "trial-100000"):
        shutil.rmtree(folder / name)
    for name in ("result.json", "score_lr.json", "frozen.json", "retrieval.json", "final.mask"):
        (folder / name).unlink()
    assert train(path, *overrides, "run.resume=true") == result
    assert (folder / "trial-1" / "result.json").stat().st_mtime_ns == made
    assert (folder / "trial-100000" / "result.json").exists()


def test_ties_go_to_the_middle_and_failed_trials_to_nobody(tmp_path: Path, photos: dict[str, str]) -> None:
    few, more, most = [1] * 30 + [0] * 70, [1] * 58 + [0] * 42, [1] * 60 + [0] * 40
    assert choose({0.001: few, 0.003: more, 0.01: most}) == 0.01, "2 points, each picture alike: 1.4 errors"
    scattered = [0, 0, 0, *([1] * 61), *([0] * 36)]
    assert choose({0.001: few, 0.003: scattered, 0.01: most}) == 0.003
    assert choose({0.001: most, 0.003: few, 0.01: ()}) == 0.001
    with pytest.raises(ValueError, match="choose smaller rates"):
        choose({0.001: (), 0.003: ()})

    config = load_config(
        write(tmp_path, photos),
        ["optim.score_lr_choices=[1.0,3.0]", "optim.warmup_epochs=1", "train.max_steps=12"],
    )
    trial = trial_config(config, 3.0)
    assert (trial.train.epochs, trial.optim.warmup_epochs) == pytest.approx((0.3, 0.1))
    assert (trial.train.max_steps, trial.optim.score_lr, trial.seed) == (2, 3.0, config.seed)

    def diverge(_: object) -> None:
        raise NonFiniteError("the loss is nan")

    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match="choose smaller rates"):
        with_chosen_score_lr(config, World(0, 1), train_fn=diverge)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["eval.retrieval_bank=100"], "eval.retrieval_samples (600) or more"),
        (["train.keep=best", "eval.retrieval=false"], "eval.retrieval=true"),
        (["train.keep=best", "objective.name=supervised"], "eval.retrieval=true"),
        (["train.keep=best", "eval.knn_every=0"], "eval.knn_every=0 measures none"),
        (["train.keep=best", "method=cascade", "objective.name=swav"], "set train.keep=last"),
        (["optim.score_lr_choices=[3.0,1.0]"], "the smallest first"),
        (["optim.score_lr_choices=[1.0,3.0]", "objective.name=supervised"], "objectives without labels"),
        (["optim.score_lr_choices=[1.0,3.0]", "eval.retrieval=false"], "objectives without labels"),
        (["optim.score_lr_choices=[1.0,3.0]", "mask.family=magnitude"], "trains no scores"),
        (["optim.score_lr_choices=[1.0,3.0]", "method=cascade", "objective.name=swav"], "of method=mask"),
        (["optim.score_lr_choices=[1.0]"], "score_lr_choices"),
    ],
)
def test_choices_that_nothing_can_make_are_refused(
    tmp_path: Path, photos: dict[str, str], overrides: list[str], says: str
) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path, photos), overrides)
    assert says in str(error.value)
