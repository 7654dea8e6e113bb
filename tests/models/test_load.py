"""A run's mask file alone answers with the run's own numbers, and nothing else is believed of it."""

import csv
import io
import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import selfmask_dist
from selfmask_dist.cli import main
from selfmask_dist.common.preprocessing import Preprocessing
from selfmask_dist.data import open_source
from selfmask_dist.maskfile import Head, Model, add_models, drop_models, read_mask_file, write_mask_file
from selfmask_dist.models.building import check_settings
from selfmask_dist.models.whole import ranked
from tests.models.cases import CLASSES, head_accuracy, pictures_of, train

HEADS = {
    "masked": ("objective.head=masked",),
    "batchnorm": ("objective.head_norm=batchnorm",),
    "finetuned": ("method=finetune", "optim.weight_lr=0.01"),
    "norms": ("method=finetune", "finetune.train=norm", "optim.weight_lr=0.1"),
}


def accuracy(loaded: selfmask_dist.models.whole.Loaded, pictures: list[Path]) -> float:
    found = loaded.predict(pictures, batch_size=16)
    return sum(one.classes[0] == path.parent.name for one, path in zip(found, pictures, strict=True)) / len(
        pictures
    )


def test_a_runs_file_alone_gives_the_runs_number(
    linear_run: Path, hard_data: dict[str, str], tmp_path: Path
) -> None:
    alone = tmp_path / "trees.mask"
    shutil.copy(linear_run / "final.mask", alone)
    pictures = pictures_of(hard_data)
    assert 0.3 < head_accuracy(linear_run) < 1, "else the numbers could be equal by chance"
    for source in (alone, linear_run):
        loaded = selfmask_dist.load(source)
        assert loaded.classes == CLASSES
        assert loaded.licence == "cc-by-4.0"
        assert accuracy(loaded, pictures) == head_accuracy(linear_run)
    assert loaded.metrics == read_mask_file(alone).metrics


@pytest.mark.parametrize("name", HEADS)
def test_every_kind_of_head_and_of_outcome(name: str, hard_data: dict[str, str], tmp_path: Path) -> None:
    folder = train(tmp_path, hard_data, name, *HEADS[name])
    loaded = selfmask_dist.load(folder)
    assert accuracy(loaded, pictures_of(hard_data)) == head_accuracy(folder)
    assert (folder / "model.json").exists() == name.startswith(("finetuned", "norms"))


def test_it_is_taken_apart_and_called(linear_run: Path, hard_data: dict[str, str]) -> None:
    model, transform, classes = selfmask_dist.load(linear_run)
    picture = pictures_of(hard_data)[0]
    views = [transform(given) for given in (picture, str(picture), picture.read_bytes(), Image.open(picture))]
    assert all(torch.equal(view, views[0]) for view in views)
    logits = model(torch.stack(views[:2]))
    assert logits.shape == (2, len(classes))
    assert torch.equal(model.head.logits(model.embed(torch.stack(views[:2]))), logits)
    source = open_source(hard_data["test"])
    assert source.classes == classes


@pytest.mark.parametrize("objective", ["supervised", "nbd"])
def test_pooling_comes_with_the_file(objective: str, hard_data: dict[str, str], tmp_path: Path) -> None:
    rate = ["optim.score_lr=0.01"] if objective == "nbd" else []
    folder = train(tmp_path, hard_data, "both", f"objective.name={objective}", "backbone.pool=both", *rate)
    shutil.copy(folder / "final.mask", tmp_path / "alone.mask")
    alone, there = selfmask_dist.load(tmp_path / "alone.mask"), selfmask_dist.load(folder)
    views = torch.stack([alone.transform(picture) for picture in pictures_of(hard_data)[:4]])
    embeddings = alone.model.embed(views)
    assert embeddings.shape == (4, 64)  # class token and mean of 32 each
    assert torch.equal(embeddings, there.model.embed(views))
    file = read_mask_file(tmp_path / "alone.mask")
    assert file.models["default"].pooling == "both"
    assert (file.models["default"].head is None) == (objective == "nbd")


def test_ties_go_to_the_first_class_and_top_is_cut() -> None:
    found = ranked("x", torch.tensor([1.0, 2.0, 2.0]), ("a", "b", "c"), 5)
    assert (found.classes, found.indices) == (("b", "c", "a"), (1, 2, 0))
    assert sum(found.probabilities) == pytest.approx(1)


def test_predict_on_the_command_line(
    linear_run: Path,
    hard_data: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pictures = pictures_of(hard_data)
    folder = pictures[0].parents[1]
    capsys.readouterr()
    assert main(["predict", str(linear_run), str(folder), "--top", "2"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["picture"] for row in rows[::2]] == [str(path) for path in pictures]
    right = sum(row["class"] == Path(row["picture"]).parent.name for row in rows if row["rank"] == "1")
    assert right / len(pictures) == head_accuracy(linear_run)
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{path}\n" for path in pictures[:3])))
    out = tmp_path / "found.json"
    command = ["predict", str(linear_run / "final.mask"), "-", "--format", "json", "--out", str(out)]
    assert main(command) == 0
    found = json.loads(out.read_text())
    assert [one["picture"] for one in found] == [str(path) for path in pictures[:3]]
    assert [one["top"][0]["class"] for one in found] == [row["class"] for row in rows[:6:2]]
    (tmp_path / "text.png").write_text("no picture")
    for words, reason in (
        (["predict", str(linear_run), str(tmp_path / "text.png")], "text.png"),
        (["predict", str(linear_run), str(tmp_path / "none.png")], "none.png: no such file"),
        (["predict", str(tmp_path / "no-run"), str(pictures[0])], "no such run, mask file or name on a hub"),
    ):
        assert main(words) == 2
        assert reason in capsys.readouterr().err


def test_a_file_without_a_head_says_so_and_embeds(
    linear_run: Path, hard_data: dict[str, str], tmp_path: Path
) -> None:
    alone = tmp_path / "final.mask"
    shutil.copy(linear_run / "final.mask", alone)
    drop_models(alone)
    picture = pictures_of(hard_data)[0]
    loaded = selfmask_dist.load(alone, config=linear_run / "config.yaml")
    whole = selfmask_dist.load(linear_run)
    view = loaded.transform(picture)[None]
    assert torch.equal(loaded(view), whole.model.embed(view))
    with pytest.raises(ValueError, match=r"has no head, so that it has embeddings and no classes"):
        loaded.predict([picture])


def test_another_backbone_is_told_by_its_fingerprint(linear_run: Path, tmp_path: Path) -> None:
    file = read_mask_file(linear_run / "final.mask")
    (model,) = file.models.values()
    other = tmp_path / "other.mask"
    write_mask_file(
        other, replace(file, models={"default": replace(model, backbone=model.backbone | {"seed": 1})})
    )
    with pytest.raises(ValueError, match="wrong backbone: timm:vit_tiny_patch16_224"):
        selfmask_dist.load(other)
    pooled = replace(model, pooling="avg")
    write_mask_file(other, replace(file, models={"default": pooled}))
    with pytest.raises(ValueError, match="pools by 'token' here, and the model was trained with 'avg'"):
        selfmask_dist.load(other)


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "timm:hf-hub:evil/model"},
        {"name": "open_clip:local-dir:/tmp/x"},
        {"name": "os:system"},
        {"name": 3},
        {"name": "timm:resnet18", "kwargs": {"checkpoint_path": "/tmp/evil.pth"}},
        {"name": "timm:resnet18", "kwargs": {"pretrained_cfg": {"url": "http://evil/x.pth"}}},
        {"name": "timm:resnet18", "kwargs": {"pretrained_cfg_overlay": 1}},
        {"name": "timm:resnet18", "kwargs": {"depth": 10**9}},
        {"name": "open_clip:ViT-B-32", "kwargs": {"vision_cfg": {"timm_model_name": "hf-hub:evil/model"}}},
        {"name": "timm:resnet18", "kwargs": {"act_layer": "os.system; rm"}},
    ],
)
def test_what_a_strangers_file_may_not_ask_for(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"a file may not|followed only from a configuration"):
        check_settings(settings, Path("x.mask"))


def test_what_it_may_ask_for() -> None:
    plain = {"depth": 2, "mlp_ratio": 4.0, "global_pool": "avg", "channels": [8, 8], "qkv_bias": True}
    check_settings({"name": "timm:vit_tiny_patch16_224.augreg", "kwargs": plain}, Path("x.mask"))
    check_settings({"name": "open_clip:ViT-B-32/openai", "kwargs": {"vision_cfg": {"layers": 2}}}, Path("x"))


def test_a_weights_file_is_named_and_asked_for(linear_run: Path, tmp_path: Path) -> None:
    weights = tmp_path / "secret" / "vit.safetensors"
    weights.parent.mkdir()
    from safetensors.torch import save_file

    from selfmask_dist.config import load_config
    from selfmask_dist.training.build import build_backbone
    from selfmask_dist.training.whole.keep import backbone_settings

    config = load_config(linear_run / "config.yaml")
    save_file(dict(build_backbone(config).encoder.state_dict()), weights)
    stated = backbone_settings(load_config(linear_run / "config.yaml", [f"backbone.weights={weights}"]))
    assert stated["weights"] == "vit.safetensors"
    assert "secret" not in json.dumps(stated)
    file = read_mask_file(linear_run / "final.mask")
    (model,) = file.models.values()
    path = tmp_path / "trees.mask"
    write_mask_file(path, replace(file, models={"default": replace(model, backbone=stated)}))
    with pytest.raises(ValueError, match=r"a file called 'vit.safetensors'.*weights="):
        selfmask_dist.load(path)
    loaded = selfmask_dist.load(path, weights=weights)
    images = torch.zeros(1, 3, 16, 16)
    assert torch.equal(loaded(images), selfmask_dist.load(linear_run)(images))


def test_a_cascade_answers_in_its_mode(tmp_path: Path) -> None:
    from selfmask_dist.cascade.model import load_cascade
    from tests.maskfile.test_bank import images, write_cascade
    from tests.support.models import make

    model, preset = make("timm_vit", dtype=torch.float32)
    path = write_cascade(model, preset, tmp_path)
    preprocessing = Preprocessing(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    expected = load_cascade(path, model)
    features = expected.embed(images(6))
    head = Head("linear", torch.randn(4, features.shape[1]))
    kwargs = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
    about = Model(
        head,
        ("a", "b", "c", "d"),
        {"name": "timm:vit_tiny_patch16_224", "weights": "weights.pt", "image_size": 16, "kwargs": kwargs},
    )
    file = read_mask_file(path)
    write_mask_file(path, replace(file, preprocessing=preprocessing.to_dict()))
    add_models(path, {"conditional": about})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = selfmask_dist.load(path, weights=tmp_path / "weights.pt")
    found = loaded(images(6))
    assert torch.equal(found, head.logits(features.float()))
    picture = Image.fromarray(np.zeros((20, 20, 3), np.uint8))
    assert loaded.predict([picture])[0].classes[0] in about.classes
