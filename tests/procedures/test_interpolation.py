"""Masks between two runs, by the scores in their checkpoints: at the ends the runs' own, bit for bit."""

import copy
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from selfmask_dist import cli, maskfile
from selfmask_dist.cli.train import run
from selfmask_dist.config import load_config
from selfmask_dist.maskfile import MaskFile, MaskFileError, from_masks, read_mask_file
from selfmask_dist.masking import attach, build_family
from selfmask_dist.procedures.interpolation import ScoredMask, interpolate, read_scored_mask
from selfmask_dist.training.build import build_backbone
from tests.support.models import make, scores_of
from tests.support.tiny_run import write_config, write_tiny_data


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two finished runs, `a` and `b`, of different seeds on one backbone."""
    folder = tmp_path_factory.mktemp("runs")
    data = write_tiny_data(folder)
    # the seed is that of the random backbone too: one weights file for both
    backbone = build_backbone(load_config(write_config(folder / "backbone.yaml", data)))
    torch.save(backbone.encoder.state_dict(), folder / "weights.pt")
    for seed, name in enumerate("ab"):
        config = write_config(folder / f"{name}.yaml", data)
        weights = f"backbone.weights={folder / 'weights.pt'}"
        overrides = [weights, f"run.name={name}", f"seed={seed}", "optim.score_lr=2000", "run.log_every=8"]
        run(load_config(config, overrides))
    return folder


def test_the_ends_are_the_runs_masks_and_the_way_is_between(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "between.mask"
    arguments = ["interpolate", runs / "a", runs / "b", "--at", 0, 0.25, 0.5, 1, "--out", out]
    assert cli.main(["mask", *map(str, arguments)]) in (0, None)
    found = read_mask_file(out)
    assert list(found.masks) == ["0", "0.25", "0.5", "1"]
    ends = [read_mask_file(runs / name / "final.mask") for name in "ab"]
    assert found.backbone_fingerprint == ends[0].backbone_fingerprint
    first, second = (end.masks["default"] for end in ends)
    encoder = build_backbone(load_config(runs / "a" / "config.yaml")).encoder
    num_apart = 0
    for name in first.bits:
        weight = encoder.get_parameter(name)
        for at, end in (("0", first), ("1", second)):
            theta = maskfile.materialize(found.masks[at], name, weight)
            assert torch.equal(theta, maskfile.materialize(end, name, weight)), (name, at)
        agree = first.bits[name] == second.bits[name]
        num_apart += int((~agree).sum())
        for at in ("0.25", "0.5"):
            assert torch.equal(found.masks[at].bits[name][agree], first.bits[name][agree]), (name, at)
    assert num_apart > 100, "two runs that learn alike test nothing"
    apart = [
        sum(int((found.masks[at].bits[name] ^ first.bits[name]).sum()) for name in first.bits)
        for at in found.masks
    ]
    assert apart == sorted(apart)
    assert 0 < apart[1] < apart[3] == num_apart


def test_scores_say_what_is_between_and_not_bits(runs: Path) -> None:
    first, second = (read_scored_mask(runs / name) for name in "ab")
    half = interpolate(first, second, 0.5)
    for name, bits in half.bits.items():
        assert torch.equal(bits, (first.scores[name] + second.scores[name]) / 2 > 0), name


def test_what_has_no_way_between_is_refused(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(first: Path, *more: str) -> str:
        out = str(tmp_path / "x.mask")
        status = cli.main(["mask", "interpolate", str(first), str(runs / "b"), "--out", out, *more])
        assert status not in (0, None)
        assert not (tmp_path / "x.mask").exists()
        return capsys.readouterr().err

    assert "1.5 is not on it" in refused(runs / "a", "--at", "1.5")
    assert "holds no final.mask" in refused(tmp_path)
    shutil.copytree(runs / "a", tmp_path / "run")
    other = read_mask_file(runs / "b" / "final.mask")
    maskfile.write_mask_file(tmp_path / "run" / "final.mask", other)
    assert "does not have the scores of" in refused(tmp_path / "run")
    graft = replace(other.masks["default"], kind="graft", values={})
    graft.values.update({name: torch.zeros(int(bits.sum())) for name, bits in graft.bits.items()})
    maskfile.write_mask_file(tmp_path / "run" / "final.mask", MaskFile({"default": graft}))
    assert "is of kind graft" in refused(tmp_path / "run")
    maskfile.write_mask_file(tmp_path / "run" / "final.mask", other)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert "has no valid checkpoint" in refused(tmp_path / "run")
    first, second = (read_scored_mask(runs / name) for name in "ab")
    elsewhere = replace(second, mask=replace(second.mask, weights_fingerprint="0" * 64))
    with pytest.raises(MaskFileError, match="only masks of one backbone combine"):
        interpolate(first, elsewhere, 0.5)


def test_thresholds_and_running_statistics_go_along() -> None:
    model, preset = make("conv", dtype=torch.float32)
    ends = []
    for seed, threshold in ((0, 0.0), (1, 0.5)):
        generator = torch.Generator().manual_seed(seed)
        trained = copy.deepcopy(model)
        masks = attach(trained, include=preset, family=build_family("threshold", threshold=threshold))
        masks.load_state_dict(
            {
                name: torch.randn(value.shape, generator=generator) + threshold
                for name, value in scores_of(masks).items()
            }
        )
        trained.train()(torch.randn(4, 3, 8, 8, generator=generator))
        mask = from_masks(masks)
        assert mask.statistics
        ends.append(ScoredMask(mask, scores_of(masks), MaskFile({"default": mask})))
    for at, end in ((0.0, ends[0]), (1.0, ends[1])):
        found = interpolate(ends[0], ends[1], at)
        assert all(torch.equal(found.bits[name], bits) for name, bits in end.mask.bits.items())
        assert found.statistics.keys() == end.mask.statistics.keys()
        assert all(torch.equal(found.statistics[name], value) for name, value in end.mask.statistics.items())
    half = interpolate(ends[0], ends[1], 0.5)
    assert half.threshold == 0.25
    name = next(name for name in half.statistics if name.endswith("running_mean"))
    mean = (ends[0].mask.statistics[name] + ends[1].mask.statistics[name]) / 2
    assert torch.allclose(half.statistics[name], mean)
    still = replace(ends[1], mask=replace(ends[1].mask, statistics={}))
    with pytest.raises(ValueError, match="only one of the runs moved running statistics"):
        interpolate(ends[0], still, 0.5)


@pytest.mark.parametrize("at", [0.0, 0.3, 1.0])
def test_weights_that_are_always_kept_stay_so(at: float) -> None:
    """Under `mask.maskable` their score is +infinity, which a difference of scores makes a NaN."""
    ends = []
    for score in (-1.0, 2.0):
        scores = torch.tensor([torch.inf, score])
        mask = maskfile.Mask({"w": scores > 0}, "same")
        ends.append(ScoredMask(mask, {"w": scores}, MaskFile({"default": mask})))
    assert interpolate(ends[0], ends[1], at).bits["w"].tolist() == [True, -1 + 3 * at > 0]
