"""Whole runs on tiny images: world 1 = world 2, a saved config repeats the run, baselines, bad input."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from data_prep.image_folder import convert_image_folder
from selfmask_dist import apply_masks, attach
from selfmask_dist.cli import main
from selfmask_dist.cli.train import run
from selfmask_dist.config import load_config
from selfmask_dist.maskfile import drop_models, read_mask_file
from selfmask_dist.runs.folder import run_path
from selfmask_dist.training.build import build_backbone
from selfmask_dist.training.meter import MaskTelemetry, NonFiniteError
from tests.support.distributed import run_distributed
from tests.support.models import make, scores_of

TINY_VIT = "{patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of noisy 16-pixel images whose colour gives the class away; 60 to train, 30 to test."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 10)):
        for label, name in enumerate(("red", "green", "blue")):
            (folder / "src" / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 120, (16, 16, 3), dtype=np.uint8)
                pixels[..., label] += 60
                Image.fromarray(pixels).save(folder / "src" / split / name / f"{index}.png")
    convert_image_folder(folder / "src", folder / "shards")
    return folder / "shards"


def settings(shards: Path, out: Path, *more: str) -> list[str]:
    return [
        f"data.train={shards / 'train'}",
        f"data.test={shards / 'test'}",
        f"run.dir={out}",
        "run.progress=false",
        "run.log_every=1",
        "backbone.pretrained=false",
        f"backbone.kwargs={TINY_VIT}",
        "backbone.image_size=16",
        "train.epochs=2",
        "train.global_batch_size=16",
        "optim.score_lr=200",
        "eval.knn_k=[5]",
        "eval.knn_every=0",
        "eval.frozen_baseline=false",
        "eval.probe=false",
        "engine.workers=0",
        "engine.device=cpu",
        *more,
    ]


def metrics_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def losses_of(directory: Path) -> list[float]:
    return [line["loss"] for line in metrics_of(directory) if "loss" in line]


def run_here(overrides: list[str], path: Path | None = None) -> Path:
    config = load_config(path, overrides)
    run(config)
    return run_path(config)


def _run_rank(overrides: list[str]) -> None:
    run(load_config(None, overrides))


def test_a_run_leaves_all_that_is_promised(shards: Path, tmp_path: Path) -> None:
    directory = run_here(
        settings(shards, tmp_path, "eval.knn_every=1", "eval.frozen_baseline=true", "eval.probe=true")
    )
    result = json.loads((directory / "result.json").read_text())
    assert result["steps"] == 8  # 60 images in batches of 16, the last one ragged, twice
    assert set(result["frozen"]) == {"knn5", "probe"}
    assert set(result["adapted"]) == {"knn5", "probe", "head"}
    alone = shutil.copy(directory / "final.mask", tmp_path)  # what a mask costs is said without its head
    assert result["mask"]["bytes"] == drop_models(alone) < (directory / "final.mask").stat().st_size
    assert 0.5 < result["mask"]["active"] < 1
    lines = metrics_of(directory)
    logged = [line for line in lines if "loss" in line]
    assert [line["step"] for line in logged] == list(range(1, 9))
    assert {"images_per_second", "data_wait", "lr/scores", "lr/head", "accuracy"} <= set(logged[0])
    assert sum(line["mask/flips"] for line in logged) > 0
    assert logged[-1]["mask/active"] == pytest.approx(result["mask"]["active"])
    assert [line["step"] for line in lines if "monitor/knn5" in line] == [4, 8]
    events = [json.loads(line)["event"] for line in (directory / "events.jsonl").read_text().splitlines()]
    assert events == ["start", "checkpoint", "end"]
    environment = json.loads((directory / "environment.json").read_text())
    assert torch.__version__.startswith(environment["packages"]["torch"])

    # the mask file on a fresh backbone gives the adapted encoder
    config = load_config(directory / "config.yaml")
    backbone = build_backbone(config)
    apply_masks(backbone.encoder, directory / "final.mask")
    file = read_mask_file(directory / "final.mask")
    assert file.backbone_fingerprint == backbone.spec.fingerprint == result["fingerprint"]
    assert file.metrics == result["adapted"]


def test_the_saved_config_repeats_the_run_bit_for_bit(shards: Path, tmp_path: Path) -> None:
    first = run_here(settings(shards, tmp_path))
    again = run_here(["run.name=again"], first / "config.yaml")
    assert losses_of(first) == losses_of(again)
    assert (first / "final.mask").read_bytes() == (again / "final.mask").read_bytes()
    other_seed = run_here(["run.name=other", "seed=1"], first / "config.yaml")
    assert losses_of(first) != losses_of(other_seed)


@pytest.mark.distributed
def test_two_processes_give_the_one_process_result(shards: Path, tmp_path: Path) -> None:
    """Same global batches, ragged ones included: losses to 1e-6, and masks equal up to reduction order."""
    overrides = settings(shards, tmp_path, "eval.frozen_baseline=true", "eval.knn_every=1")
    one = run_here([*overrides, "run.name=one"])
    run_distributed(_run_rank, 2, [*overrides, "run.name=two"], backend="")
    two = tmp_path / "two"
    assert losses_of(two) == pytest.approx(losses_of(one), rel=1e-6)
    results = [json.loads((d / "result.json").read_text()) for d in (one, two)]
    assert results[0]["frozen"] == results[1]["frozen"]
    masks = [read_mask_file(d / "final.mask").masks["default"].bits for d in (one, two)]
    different = sum(int((masks[0][name] ^ masks[1][name]).sum()) for name in masks[0])
    pruned = sum(int((~bits).sum()) for bits in masks[0].values())
    total = sum(bits.numel() for bits in masks[0].values())
    assert pruned > 0.01 * total, "the run must prune something"
    assert different <= 1e-4 * total


def test_accumulation_and_workers_change_nothing(shards: Path, tmp_path: Path) -> None:
    base = settings(shards, tmp_path, "train.max_steps=4")
    one = run_here([*base, "run.name=one"])
    micro = run_here([*base, "run.name=micro", "train.accumulate=3"])
    assert losses_of(micro) == pytest.approx(losses_of(one), rel=1e-5)
    workers = run_here([*base, "run.name=workers", "engine.workers=2"])
    assert losses_of(workers) == losses_of(one)


@pytest.mark.parametrize("method", ["finetune", "probe", "frozen"])
def test_baselines_come_from_the_same_config_by_one_key(shards: Path, tmp_path: Path, method: str) -> None:
    directory = run_here(settings(shards, tmp_path, f"method={method}"))
    result = json.loads((directory / "result.json").read_text())
    assert result["method"] == method
    if method == "finetune":
        weights = load_file(directory / "encoder.safetensors")
        frozen = build_backbone(load_config(directory / "config.yaml")).encoder.state_dict()
        assert set(weights) == set(frozen)
        assert not torch.equal(weights["blocks.0.mlp.fc1.weight"], frozen["blocks.0.mlp.fc1.weight"])
        assert set(result["adapted"]) == {"knn5", "head"}
    else:
        assert ("probe" in result["frozen"]) == (method == "probe")
        assert not list(directory.glob("*.mask"))


def test_a_masked_head_trains_by_its_mask_alone(shards: Path, tmp_path: Path) -> None:
    directory = run_here(settings(shards, tmp_path, "objective.head=masked"))
    assert (directory / "head.mask").exists()
    losses = losses_of(directory)
    assert min(losses[-3:]) < losses[0]


def test_clip_is_masked_through_its_text_head(shards: Path, tmp_path: Path) -> None:
    """No head is trained: the masked image tower moves towards the frozen text embeddings of the classes."""
    tower = "vision_cfg: {image_size: 16, layers: 2, width: 32, head_width: 16, patch_size: 8}"
    text = "text_cfg: {context_length: 16, width: 16, heads: 2, layers: 1}"
    kwargs = f"{{embed_dim: 16, {tower}, {text}}}"
    clip = settings(shards, tmp_path, "backbone.name=open_clip:ViT-B-32", f"backbone.kwargs={kwargs}")
    masked = run_here([*clip, "objective.head=clip_text", "mask.split_qkv=true", "train.epochs=4"])
    losses = losses_of(masked)
    assert min(losses[-3:]) < losses[0]
    assert not (masked / "head.safetensors").exists()
    mask = read_mask_file(masked / "final.mask").masks["default"]
    assert mask.num_segments["transformer.resblocks.0.attn.in_proj_weight"] == 3
    backbone = build_backbone(load_config(masked / "config.yaml"))
    apply_masks(backbone.encoder, masked / "final.mask")


def test_weights_and_biases_offline(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    directory = run_here(settings(shards, tmp_path, "run.wandb=offline", "train.max_steps=2"))
    (log,) = directory.glob("wandb/offline-run-*/run-*.wandb")
    assert log.stat().st_size > 0


class TestBadInput:
    def test_unknown_key(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        (tmp_path / "c.yaml").write_text("optim:\n  scor_lr: 3\n")
        assert main(["train", "--config", str(tmp_path / "c.yaml")]) == 2
        assert f"{tmp_path / 'c.yaml'}:2: unknown key optim.scor_lr" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("mask.include=nothing.*", "include 'nothing.*' matches no parameter"),
            ("mask.include=blocks.0.norm1.*", "would mask normalisation layers: blocks.0.norm1"),
            ("data.train={tmp}/empty", "empty"),
            ("data.train=null", "data.train is not set"),
            ("train.global_batch_size=0", "train.global_batch_size"),
            ("backbone.weights={tmp}/none.safetensors", "not there"),
        ],
    )
    def test_clear_errors(
        self, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
    ) -> None:
        (tmp_path / "empty").mkdir()
        arguments = settings(shards, tmp_path / "runs", override.replace("{tmp}", str(tmp_path)))
        assert main(["train", *arguments]) == 2
        error = capsys.readouterr().err
        assert "error: " in error
        assert message in error
        assert "Traceback" not in error

    def test_an_earlier_run_is_not_overwritten_by_accident(self, shards: Path, tmp_path: Path) -> None:
        arguments = settings(shards, tmp_path, "train.max_steps=1")
        directory = run_here(arguments)
        (directory / "notes.txt").write_text("mine")
        before = (directory / "final.mask").read_bytes()
        with pytest.raises(ValueError, match=r"holds a run already; set run\.name"):
            run_here(arguments)
        assert (directory / "final.mask").read_bytes() == before
        run_here([*arguments, "run.overwrite=true"])
        assert (directory / "notes.txt").read_text() == "mine"

    def test_nan_loss_stops_names_the_batch_and_saves_it(
        self, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        # the scale of the features makes the head explode within a few steps
        arguments = settings(
            shards, tmp_path, "objective.head_norm=none", "optim.head_lr=1e38", "train.epochs=20"
        )
        with pytest.raises(
            NonFiniteError, match=r"the loss is (nan|inf) at step \d+ \(epoch \d+\) on rank 0"
        ):
            run_here(arguments)
        (path,) = (tmp_path / "run").glob("failure-step*-rank0.pt")
        saved = torch.load(path, weights_only=True)
        assert saved["views"][0].shape[1:] == (3, 16, 16)
        assert len(saved["labels"]) == len(saved["ids"]) == len(saved["views"][0])
        events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
        assert events[-1]["event"] == "failed"
        assert main(["train", *arguments, "run.overwrite=true"]) == 3
        assert "stopped: the loss is" in capsys.readouterr().err

    def test_scores_that_overflow_stop_the_run(self) -> None:
        """A score of NaN would count as pruned and the loss stay finite: it must not go unseen."""
        model, preset = make("timm_vit", dtype=torch.float32)
        masks = attach(model, include=preset)
        telemetry = MaskTelemetry(masks)
        telemetry.before_step()
        assert telemetry.after_step()["mask/flips"] == 0
        state = {name: scores.clone() for name, scores in scores_of(masks).items()}
        state["blocks.0.mlp.fc1.weight"][0, :3] = torch.nan
        masks.load_state_dict(state)
        with pytest.raises(NonFiniteError, match="3 scores are not finite"):
            telemetry.after_step()
