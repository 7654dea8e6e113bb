"""Runs with the training habits of the field: what is kept, averages, mixed pictures, rates by layer."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from selfmask_dist.cli.train import run
from selfmask_dist.config import ConfigError, load_config
from selfmask_dist.maskfile import read_mask_file
from selfmask_dist.runs.checkpoint import committed, read_checkpoint, step_of
from selfmask_dist.runs.verdict import closing
from selfmask_dist.training.habits.layer_rates import layer_depths
from tests.support.distributed import run_distributed
from tests.support.resuming import KEEP, check_resumed_equals_whole, cut_back, last_state, losses_of
from tests.support.tiny_run import ROOT, result_of, write_config, write_tiny_data

MIXED = ["augment.mixup=0.4", "augment.cutmix=1.0", "augment.randaugment=1", "augment.erase=0.25"]
REGRESSION = ["objective.target=regression"]
RMS = ["optim.score_step=rms", "optim.score_lr=0.05"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_tiny_data(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def path(tmp_path: Path, data: dict[str, str]) -> Path:
    return write_config(tmp_path / "tiny.yaml", data)


def train(path: Path, name: str, *overrides: str) -> dict[str, Any]:
    return run(load_config(path, [f"run.name={name}", *overrides]))


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def state_at(folder: Path, step: int) -> dict[str, torch.Tensor]:
    found = next(one for one in committed(folder / "checkpoints") if step_of(one) == step)
    return read_checkpoint(found).tensors


# ---- the state that is kept, and the end


def test_the_best_on_the_validation_part_is_kept_and_patience_ends_the_run(
    tmp_path: Path, path: Path
) -> None:
    overrides = ["train.keep=best", "train.validation=0.25", "train.patience=3", "eval.knn_every=0.5"]
    overrides += ["train.epochs=10", *RMS, *KEEP]
    result, folder = train(path, "a", *overrides), tmp_path / "a"
    measured = {line["step"]: line for line in lines_of(folder) if "validation/accuracy" in line}
    accuracies = {step: line["validation/accuracy"] for step, line in measured.items()}
    assert all((11 * value) % 1 == 0 for value in accuracies.values()), "11 pictures are held out"
    kept, last = result["kept"], max(accuracies)
    assert kept["step"] == result["kept_step"] == max(accuracies, key=accuracies.__getitem__)
    assert kept["by"] == "accuracy"
    assert kept["value"] == accuracies[kept["step"]]
    assert last == result["steps"] == kept["made"] == kept["step"] + 3 * 2 < kept["planned"]
    said = f"KEPT: the state of step {kept['step']} of {kept['planned']}, by validation accuracy"
    assert said in closing(folder)
    assert f"training stopped after step {last}, as 3 measurements" in closing(folder)
    bits = read_mask_file(folder / "final.mask").masks["default"].bits
    scores = state_at(folder, kept["step"])
    assert all(torch.equal(one, scores[f"parameters/encoder.{key}"] > 0) for key, one in bits.items())

    # killed after the best state, and once more when it had stopped: the same end
    mask, losses = (folder / "final.mask").read_bytes(), losses_of(folder)
    for step in (kept["step"] + 1, last):
        cut_back(folder, step)
        assert train(path, "a", *overrides, "run.resume=true") == result
        assert (folder / "final.mask").read_bytes() == mask
        assert losses_of(folder) == losses


def test_the_lowest_loss_is_kept_where_it_is_asked_for(tmp_path: Path, path: Path) -> None:
    overrides = ["train.keep=best", "train.keep_by=loss", "train.validation=0.25", "eval.knn_every=0.4", *RMS]
    result = train(path, "a", *overrides, "train.epochs=3", "optim.score_lr=0.2")
    losses = {
        line["step"]: line[key] for line in lines_of(tmp_path / "a") if (key := "validation/loss") in line
    }
    losses = {step: loss for step, loss in losses.items() if loss == min(losses.values())}
    assert result["kept_step"] in losses or result["kept"]["value"] < min(losses.values())
    assert result["kept"]["by"] == "loss"
    assert result["kept"]["value"] <= min(losses.values())
    assert result["steps"] == result["kept"]["planned"]


# ---- averages


def test_what_is_evaluated_and_saved_is_the_average(tmp_path: Path, path: Path) -> None:
    overrides = ["train.ema=0.7", "eval.knn_every=1", "train.validation=0.25", *RMS, *KEEP]
    train(path, "a", *overrides)
    folder, name = tmp_path / "a", "parameters/encoder.blocks.0.attn.qkv.weight"
    steps = max(step_of(one) for one in committed(folder / "checkpoints"))
    average = torch.zeros_like(state_at(folder, 1)[name]) + 1.0  # scores start there
    for step in range(1, steps):
        decay = min(0.7, step / (9 + step))
        state = state_at(folder, step)
        average = decay * average + (1 - decay) * state[name]
        torch.testing.assert_close(state[name.replace("parameters", "teacher")], average)
        assert not torch.equal(state[name], average)
    last = last_state(folder)  # of the last step, when the average has taken its place
    assert torch.equal(last[name], last[name.replace("parameters", "teacher")])
    bits = read_mask_file(folder / "final.mask").masks["default"].bits["blocks.0.attn.qkv.weight"]
    assert torch.equal(bits, last[name] > 0)
    raw = train(path, "raw", *overrides[1:], *KEEP)
    assert raw["mask"]["active"] != result_of(folder)["mask"]["active"]
    measured = [line for line in lines_of(folder) if "validation/loss" in line]
    again = [line for line in lines_of(tmp_path / "raw") if "validation/loss" in line]
    assert losses_of(folder) == losses_of(tmp_path / "raw"), "training itself does not see the average"
    assert measured[0]["validation/loss"] != again[0]["validation/loss"]


@pytest.mark.parametrize(
    "more", [["method=finetune"], ["objective.head=masked", *RMS]], ids=["weights", "masked"]
)
def test_every_habit_at_once_resumes_bit_for_bit(tmp_path: Path, path: Path, more: list[str]) -> None:
    overrides = [
        "run.name=a",
        "train.ema=0.9",
        "train.validation=0.2",
        "optim.layer_decay=0.7",
        *MIXED,
        *more,
    ]
    overrides += ["train.keep=best", "eval.knn_every=0.5"]
    check_resumed_equals_whole(path, overrides, tmp_path / "a", step=5)


ALL_HABITS = ["train.ema=0.9", "train.keep=best", "train.validation=0.25", "eval.knn_every=0.5", *MIXED, *RMS]


def two_ranks(path: Path, engine: str) -> dict[str, Any]:
    return train(path, engine, *ALL_HABITS, "optim.layer_decay=0.8", f"engine.name={engine}")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, data: dict[str, str]) -> Path:
    """The folder of a run with all habits, on one process."""
    folder = tmp_path_factory.mktemp("alone")
    train(write_config(folder / "tiny.yaml", data), "one", *ALL_HABITS, "optim.layer_decay=0.8")
    return folder / "one"


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ["ddp", "fsdp", "bits"])
def test_two_ranks_train_what_one_does(tmp_path: Path, path: Path, alone: Path, engine: str) -> None:
    results = run_distributed(two_ranks, 2, path, engine, timeout=120, backend="")
    assert losses_of(tmp_path / engine) == pytest.approx(losses_of(alone), rel=1e-4)
    kept = result_of(alone)["kept"]
    for result in results:
        assert result["kept"] == kept, "right answers are counted"
    one, two = (
        read_mask_file(run / "final.mask").masks["default"].bits for run in (alone, tmp_path / engine)
    )
    differ = sum(int((one[key] != two[key]).sum()) for key in one)
    assert differ <= 1e-3 * sum(bits.numel() for bits in one.values()), "but for rounding"


# ---- rates by layer


def test_depths_follow_the_blocks() -> None:
    names = ["proj", "conv1.weight", "blocks.0.w", "blocks.1.w", "blocks.1.norm.w", "norm.w"]
    depths = layer_depths(names, ("blocks.0", "blocks.1"))
    assert depths == dict(zip(names, [3, 0, 1, 2, 2, 3], strict=True))
    stages = ["stem.w", "s1.b0.w", "s2.down.w", "s2.b0.w", "head.norm.w"]
    assert [*layer_depths(stages, ("s1.b0", "s2.b0")).values()] == [0, 1, 1, 2, 3]
    with pytest.raises(ValueError, match=r"optim\.layer_decay=null"):
        layer_depths(names, ())


@pytest.mark.parametrize(
    "more", [RMS, ["optim.score_step=plain"], ["method=finetune"], ["method=finetune", "finetune.train=lora"]]
)
def test_a_step_of_a_lower_block_is_shorter(tmp_path: Path, path: Path, more: list[str]) -> None:
    if "finetune.train=lora" in more:
        pytest.importorskip("peft")
    overrides = [*more, "train.max_steps=1", "eval.final=false", *KEEP]
    for name, decay in (("none", "null"), ("half", "0.5")):
        train(path, name, *overrides, f"optim.layer_decay={decay}")
    plain, halved = (last_state(tmp_path / name) for name in ("none", "half"))
    zero = {key: torch.zeros(()) for key in plain}
    moved = {key: plain[key] - zero[key] for key in plain if key.startswith("momentum/")}
    assert all(torch.equal(halved[key], moment) for key, moment in moved.items()), (
        "the gradients are the same"
    )
    rates = {line["step"]: line for line in lines_of(tmp_path / "half") if "loss" in line}[1]
    group = "weights" if "method=finetune" in more else "scores"
    base = {line["step"]: line for line in lines_of(tmp_path / "none") if "loss" in line}[1][f"lr/{group}"]
    assert rates[f"lr/{group}.depth1"] == pytest.approx(base / 4)
    assert rates[f"lr/{group}.depth2"] == pytest.approx(base / 2)
    assert rates["lr/head"] == pytest.approx(0.1)
    for block, factor in ((0, 0.25), (1, 0.5)):
        key = next(key for key in moved if f"blocks.{block}." in key and plain[key].any())
        name = key.replace("momentum/", "parameters/")
        # both runs started alike, so where they are now differs by the factor's rest
        difference = (plain[name] - halved[name]).double()
        wanted = -(1 - factor) * base * plain[key].double()
        torch.testing.assert_close(difference, wanted, rtol=1e-2, atol=1e-6)


# ---- what does not go together, and what the docs say does


def test_the_commands_of_the_docs_are_configurations() -> None:
    page = (ROOT / "docs" / "habits.md").read_text()
    commands = [line.split() for line in page.splitlines() if line.startswith("    selfmask launch --config")]
    assert len(commands) == 3
    for _, _, _, name, *overrides in commands:
        load_config(name, overrides)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.keep=best"], "train.validation=0.1 to go by accuracy"),
        (["train.patience=3"], "set train.keep=best"),
        (["train.keep=best", "train.keep_by=loss"], "never on data.test"),
        (["train.validation=0.1", "eval.knn_every=0"], "eval.knn_every=0 measures nothing"),
        (["train.validation=0.1", "objective.name=simclr", "eval.knn_every=1"], "trains none"),
        (["train.ema=0.9", "engine.name=deepspeed"], "use engine.name=fsdp"),
        (["train.ema=0.9", "objective.name=nbd"], "set train.ema=null"),
        (["train.ema=0.9", "method=finetune", "procedure.hold=codes.safetensors"], "puts held weights back"),
        (["train.ema=0.9", "method=lottery"], "goes on from what was trained itself"),
        (["train.validation=0.1", "method=packnet", "eval.knn_every=1"], "trains several times"),
        (["augment.mixup=0.2", "objective.name=nbd"], "augment.mixup mixes targets"),
        (["augment.cutmix=1.0", *REGRESSION], "augment.cutmix mixes classes"),
        (["augment.mixup=0.2", "objective.target=dense"], "augment.mixup mixes classes"),
        (["augment.erase=0.2", "objective.target=dense"], "would move or cover pixels"),
        (
            [
                "train.keep=best",
                "train.keep_by=accuracy",
                "train.validation=0.1",
                "objective.target=regression",
            ],
            "set train.keep_by=loss",
        ),
        (["augment.randaugment=2", "objective.name=swav"], "makes its own views"),
        (["augment.erase=0.2", "data.augment=false"], "asks for images as they are evaluated"),
        (
            ["optim.layer_decay=0.8", "mask.family=topk", "mask.keep_scope=global"],
            "set mask.keep_scope=tensor",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(path: Path, overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace(".", r"\.")):
        load_config(path, ["eval.knn_every=1", *overrides])
