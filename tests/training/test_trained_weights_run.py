"""Whole runs of families that train or quantise weights: their configs, resumes, files and a teacher."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from selfmask_dist import apply_masks
from selfmask_dist.cli.train import run
from selfmask_dist.config import Config, ConfigError, load_config
from selfmask_dist.config.masks import MASK_FAMILIES, OTHER_FAMILIES
from selfmask_dist.maskfile import read_mask_file, verify_mask_file
from selfmask_dist.maskfile.tools.shrink import shrink
from selfmask_dist.masking.families import FAMILIES
from selfmask_dist.objectives import Context
from selfmask_dist.objectives.supervised import distillation_losses
from selfmask_dist.runs.folder import run_path
from selfmask_dist.training.build import build_backbone, build_objective
from selfmask_dist.training.distill import DistillTeacher
from tests.runs.test_checkpoint import assert_same, cut_back, outcome
from tests.support.tiny_run import SETTINGS, write_tiny_data

COLOURS = ("blue", "green", "red")
CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "methods"
FORMS = {
    "twn": "ternary",
    "ttq": "ternary",
    "binary_connect": "sign",
    "multi_prize": "frozen_sign",
    "graft": "graft",
    "neural_wirings": "values",
    "movement": "values",
    "soft_movement": "values",
    "joint": "values",
    "block_movement": "values",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures in `shards`, and a finished run of full fine-tuning in `runs/finetuned`."""
    path = tmp_path_factory.mktemp("trained")
    write_tiny_data(path)
    run(load_config(None, settings(path, "method=finetune", "run.name=finetuned")))
    return path


def settings(folder: Path, *more: str) -> list[str]:
    given = [
        f"{section}.{key}={json.dumps(value)}"
        for section, values in SETTINGS.items()
        for key, value in values.items()
    ]
    places = [f"data.{split}={folder / 'shards' / split}" for split in ("train", "test")]
    return [*given, *places, f"run.dir={folder / 'runs'}", "eval.final=false", *more]


def config_of(folder: Path, name: str, *more: str) -> Config:
    own = [f"mask.graft_from={folder / 'runs' / 'finetuned'}"] if name == "graft" else []
    if name == "block_movement":
        own += ["mask.block_rows=16", "mask.block_columns=0"]
    return load_config(next(CONFIGS.glob(f"*/{name}.yaml")), settings(folder, *own, *more))


@pytest.mark.parametrize("name", OTHER_FAMILIES)
def test_a_killed_run_ends_bit_for_bit_as_if_nothing_had_been(name: str, folder: Path) -> None:
    """With the family's own config; the mask file on a fresh backbone is what was trained."""
    keep = ("checkpoint.every_steps=1", "checkpoint.keep_last=100", "optim.weight_decay=0.001")
    config = config_of(folder, name, *keep)
    result = run(config)
    directory = run_path(config)
    expected = outcome(directory)
    losses = [loss for _, loss in expected["losses"]]
    assert losses[-1] < losses[0]
    cut_back(directory, 5)
    run(load_config(directory / "config.yaml", ["run.resume=true"]))
    assert_same(outcome(directory), expected)

    mask = read_mask_file(directory / "final.mask").masks["default"]
    assert mask.kind == FORMS[name]
    assert result["mask"]["active"] == pytest.approx(mask.num_kept() / mask.num_weights())
    assert verify_mask_file(directory / "final.mask").startswith("whole")
    encoder = build_backbone(config).encoder
    before = {key: value.detach().clone() for key, value in encoder.named_parameters()}
    apply_masks(encoder, directory / "final.mask")
    assert all(not torch.equal(encoder.get_parameter(key), before[key]) for key in mask.bits)
    if name == "block_movement":
        assert set(mask.blocks) == set(mask.bits)
        left = shrink(encoder)
        assert min(left.values()) < 32, "rows of hidden units are gone"


def test_a_teacher_is_learned_from(folder: Path) -> None:
    teacher = f"objective.distill_from={folder / 'runs' / 'finetuned'}"
    plain = load_config(None).objective
    # all of the loss: it falls where the student comes nearer to the teacher
    config = config_of(
        folder, "movement", "run.name=taught", teacher, "objective.distill_weight=1.0", "train.epochs=6"
    )
    run(config)
    losses = [loss for _, loss in outcome(run_path(config))["losses"]]
    assert losses[-1] < 0.5 * losses[0]
    saved = load_file(run_path(config) / "head.safetensors")
    assert not any("teacher" in key for key in saved)
    by_mask = DistillTeacher(run_path(config), COLOURS)  # a run that left a mask, itself taught
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    backbone = build_backbone(config)
    apply_masks(backbone.encoder, run_path(config) / "final.mask")
    head = build_objective(
        config.model_copy(update={"objective": plain}), backbone, COLOURS, Context(), steps_per_epoch=1
    )
    head.load_state_dict(saved)
    expected = head.predict(backbone.encoder.eval(), images)
    assert torch.equal(by_mask(images), expected)
    assert expected.abs().max() > 0
    with pytest.raises(ValueError, match="holds no finished run"):
        run(config_of(folder, "movement", "run.name=b", f"objective.distill_from={folder}"))
    with pytest.raises(ConfigError, match=r"set objective\.name=supervised"):
        config_of(folder, "movement", teacher, "objective.name=swav")


def test_distillation_is_the_published_divergence() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 7, 5, generator=generator, dtype=torch.float64)
    expected = 2.5**2 * F.kl_div(
        F.log_softmax(student / 2.5, dim=1), F.softmax(teacher / 2.5, dim=1), reduction="batchmean"
    )
    found = distillation_losses(student, teacher, 2.5)
    assert found.mean().item() == pytest.approx(expected.item(), rel=1e-12)
    assert distillation_losses(student, student, 2.5).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("twn", "engine.name=bits", "engine.name=bits trains masks on frozen weights"),
        ("ttq", "engine.name=deepspeed", "use ddp or fsdp"),
        ("joint", "objective.head=masked", "set objective.head=linear"),
        ("movement", "mask.maskable=0.5", "set it to 1 with mask.family=movement"),
        ("movement", "mask.keep_schedule=constant", "mask.keep_schedule=cubic (the published one)"),
        ("movement", "mask.keep_from=0.8", "the schedule has no time"),
        ("soft_movement", "mask.threshold=0.0", "set it between 0 and 1"),
        ("block_movement", "mask.keep_scope=global", "set mask.keep_scope=tensor"),
        ("block_movement", "mask.keep_schedule=constant", "set mask.keep_schedule=cubic"),
        ("multi_prize", "mask.init=1.0", "gives all scores one rank"),
    ],
)
def test_settings_that_do_not_go_together(folder: Path, name: str, change: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        config_of(folder, name, change)
    assert message in str(error.value)


def test_grafting_needs_weights(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder, "graft", f"mask.graft_from={tmp_path}", "run.name=c")
    with pytest.raises(ValueError, match=r"has no encoder\.safetensors; name the folder of a finished run"):
        run(config)
    with pytest.raises(ValueError, match=r"mask\.graft_from is not set: give the fine-tuned weights"):
        run(config_of(folder, "graft", "mask.graft_from=null", "run.name=d"))


def test_names_of_families_are_known_to_the_configuration() -> None:
    assert set(MASK_FAMILIES) == set(FAMILIES)
    others: set[Any] = {name for name, family in FAMILIES.items() if not family.is_mask}
    assert set(OTHER_FAMILIES) == others == set(FORMS)
