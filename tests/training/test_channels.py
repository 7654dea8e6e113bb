"""Runs on images of one, four and twelve channels: TIFF files to tars, a run, its file alone."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from torch import nn

import selfmask_dist
from data_prep.bands.__main__ import main as convert
from selfmask_dist.backbones.inputs.stem import inflate_stem
from selfmask_dist.cli.train import run
from selfmask_dist.common.pictures import ShapeError
from selfmask_dist.common.preprocessing import Preprocessing
from selfmask_dist.config import load_config
from selfmask_dist.config.loading import ConfigError
from selfmask_dist.data import DenseTransform, eval_transform, train_transform
from selfmask_dist.data.views.bands import as_bands, checked, read_npy, read_tiff, scaled
from selfmask_dist.data.views.stronger import Stronger
from tests.support.tiny_run import result_of, write_config

TYPES = {1: "uint8", 4: "uint16", 12: "float32"}


def write_tiffs(folder: Path, channels: int) -> None:
    """Pictures of two classes that differ in the last channel alone."""
    rng, kind = np.random.default_rng(0), TYPES[channels]
    largest = {"uint8": 255, "uint16": 65535, "float32": 1}[kind]
    for part, number in (("train", 24), ("test", 12)):
        for index in range(number):
            values = rng.uniform(0.2, 0.6, size=(channels, 20, 16))
            values[-1] += 0.3 * (index % 2)
            path = folder / part / f"class{index % 2}" / f"{index:03d}.tif"
            path.parent.mkdir(parents=True, exist_ok=True)
            planes = (values * largest).astype(kind)
            tifffile.imwrite(path, planes[0] if channels == 1 else planes, photometric="minisblack")


@pytest.mark.parametrize("channels", TYPES)
def test_a_run_from_tiffs_to_a_file_that_answers(
    channels: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiffs(tmp_path / "tiffs", channels)
    assert convert([str(tmp_path / "tiffs"), str(tmp_path / "shards")]) == 0
    first, *keys = capsys.readouterr().out.splitlines()
    assert first.startswith(f"36 samples of {channels} channels")
    data = {part: str(tmp_path / "shards" / part) for part in ("train", "test")}
    config = write_config(tmp_path / "run.yaml", data, train={"epochs": 2, "global_batch_size": 12})
    objective = "nbd" if channels == 4 else "supervised"
    rate = "optim.score_lr=0.01" if objective == "nbd" else "optim.score_lr=300"
    given = [f"objective.name={objective}", "run.name=it", rate]
    run(load_config(config, [*keys, *given]))
    assert result_of(tmp_path / "it")["adapted"]["knn5"] > 0.7  # the classes differ in the last channel alone
    assert ("blur, which are made for RGB, are left out" in capsys.readouterr().err) == (channels == 4)
    shutil.copy(tmp_path / "it" / "final.mask", tmp_path / "alone.mask")
    picture = next((tmp_path / "tiffs" / "test").rglob("*.tif"))
    np.save(tmp_path / "one.npy", read_tiff(picture.read_bytes()))
    found = [selfmask_dist.load(path) for path in (tmp_path / "alone.mask", tmp_path / "it")]
    view = found[0].transform(tmp_path / "one.npy")
    assert view.shape == (channels, 16, 16)
    assert torch.equal(found[0].model.embed(view[None]), found[1].model.embed(view[None]))


def test_numbers_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", {"train": "x", "test": "y"})
    with pytest.raises(ConfigError, match=r"data\.channels=4 has no statistics of pretraining"):
        load_config(config, ["data.channels=4"])
    with pytest.raises(ConfigError, match=r"hold 3 numbers, and data\.channels is 4"):
        load_config(config, ["data.channels=4", "backbone.mean=[0,0,0]", "backbone.std=[1,1,1]"])


def test_the_stem_is_inflated_as_timm_does_it() -> None:
    weights = torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    for channels in (1, 2, 4, 12):
        stem = nn.Conv2d(3, 8, 3)
        stem.weight.data.copy_(weights)
        network = nn.Sequential(stem)
        inflate_stem(network, channels, name="it")
        found = stem.weight
        assert found.shape == (8, channels, 3, 3)
        expected = weights.sum(dim=1, keepdim=True) if channels == 1 else None
        if expected is None:
            expected = weights.repeat(1, 4, 1, 1)[:, :channels] * (3 / channels)
        torch.testing.assert_close(found.data, expected)
        assert network(torch.zeros(1, channels, 4, 4)).shape == (1, 8, 2, 2)
    with pytest.raises(ValueError, match="it cannot take 4 channels"):
        inflate_stem(nn.Linear(3, 3), 4, name="it")


def test_values_keep_their_depth_and_views_are_those_of_rgb() -> None:
    deep = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    assert np.array_equal(scaled(checked(deep))[..., 0], deep / np.float32(65535))
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, size=(40, 30, 3), dtype=np.uint8)
    three, six = (Preprocessing(16, (0.4, 0.5, 0.6) * n, (0.2, 0.3, 0.4) * n, "bilinear") for n in (1, 2))
    (view,) = eval_transform(six)(np.concatenate([rgb, rgb], axis=2), rng)
    (own,) = eval_transform(three)(as_bands(rgb, 3).astype(np.float32) / np.float32(255), rng)
    (pil,) = eval_transform(three)(Image.fromarray(rgb), rng)
    assert torch.equal(view[:3], view[3:])
    torch.testing.assert_close(view[:3], own)
    assert (own - pil).abs().max() < 2.1 / 255 / 0.2  # PIL rounds between its two passes
    for bad, reason in (
        (np.zeros((4, 4, 17), np.uint8), "1 to 16 channels"),
        (np.zeros((4, 4), np.int64), "is of type int64"),
        (np.full((4, 4), np.nan, np.float32), "not finite"),
    ):
        with pytest.raises(ValueError, match=reason):
            checked(bad)
    with pytest.raises(ValueError, match=r"cannot be read as a \.npy"):
        read_npy(b"\x93NUMPY and rot")
    with pytest.raises(ValueError, match="cannot be read as a TIFF"):
        read_tiff(b"rot")
    with pytest.raises(ValueError, match=r"has 3 channels, and data\.channels is 4"):
        as_bands(rgb, 4)


def test_deep_arrays_of_three_channels_are_not_taken_where_rgb_is_needed() -> None:
    deep, pre = np.full((20, 20, 3), 40000, np.uint16), Preprocessing(16, (0.5,) * 3, (0.5,) * 3)
    for stronger in (None, Stronger(erase=1.0)):
        (view,) = train_transform(pre, stronger=stronger)(deep, np.random.default_rng(0))
        assert view.shape == (3, 16, 16)
        assert bool((view == 0).any()) == (stronger is not None)  # what is erased
    with pytest.raises(ShapeError, match="which RandAugment is made for"):
        train_transform(pre, stronger=Stronger(operations=1))(deep, np.random.default_rng(0))
    with pytest.raises(ShapeError, match="dense targets take no others yet"):
        DenseTransform(pre).pair(deep, Image.new("L", (20, 20)), np.random.default_rng(0))
