"""Runs towards several labels, numbers and label maps: what they leave, measure and answer."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import (
    average_precision_score,
    mean_absolute_error,
    r2_score,
)

from selfmask_dist import cli, data
from selfmask_dist.data.targets import TargetKind
from selfmask_dist.evals.targets.metrics import confusion, mean_iou
from selfmask_dist.models.load import load
from selfmask_dist.objectives.targets.dense import enlarged
from tests.support.targets import CLASSES, run_target, write_targets

NAMES = {"multilabel": {"map"}, "regression": {"r2", "mae"}, "dense": {"miou"}}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_targets(tmp_path_factory.mktemp("targets"))


def scores_by_hand(kind: TargetKind, run: Path, test: str) -> dict[str, float]:
    """The head's scores of the whole model that a run left, by scikit-learn."""
    loaded, source = load(run), data.open_source(test, require_labels=False)
    targets = data.Targets(kind, loaded.classes)
    if kind == "dense":
        transform = data.DenseTransform(loaded.transform.preprocessing)
        loader = data.eval_loader(source, transform, batch_size=16).with_targets(targets)
        (batch,) = loader
        assert batch.targets is not None
        found = enlarged(loaded(batch.views[0]), (16, 16)).argmax(dim=1)
        return {"miou": mean_iou(confusion(found, batch.targets, len(CLASSES)))}
    (batch,) = data.eval_loader(
        source, data.eval_transform(loaded.transform.preprocessing), batch_size=16
    ).with_targets(targets)
    assert batch.targets is not None
    outputs, truth = loaded(batch.views[0]).numpy(), batch.targets.numpy()
    if kind == "multilabel":
        return {"map": average_precision_score(truth, outputs)}
    return {"r2": r2_score(truth, outputs), "mae": mean_absolute_error(truth, outputs)}


@pytest.mark.parametrize("kind", ["multilabel", "regression", "dense"])
def test_a_mask_is_trained_measured_and_answers(
    kind: TargetKind, shards: dict[str, str], tmp_path: Path
) -> None:
    run = tmp_path / kind
    result = run_target(
        shards,
        run,
        f"objective.target={kind}",
        "optim.score_lr=3000",
        "eval.frozen_baseline=false",
        f"eval.probe={str(kind != 'dense').lower()}",
    )
    parts = ("head", "probe") if kind != "dense" else ("head",)
    assert result["adapted"].keys() == {f"{part}_{name}" for part in parts for name in NAMES[kind]}
    assert 0 < result["mask"]["active"] < 1
    for name, value in scores_by_hand(kind, run, shards["test"]).items():
        assert result["adapted"][f"head_{name}"] == pytest.approx(value, abs=1e-4)
    loaded = load(run / "final.mask")
    assert loaded.classes == (("value",) if kind == "regression" else tuple(CLASSES))
    assert loaded.model.head is not None
    assert loaded.model.head.target == kind


def test_frozen_lora_and_full(shards: dict[str, str], tmp_path: Path) -> None:
    settings = ("objective.target=multilabel", "train.epochs=1")
    frozen = run_target(shards, tmp_path / "frozen", settings[0], "method=probe")
    assert frozen["frozen"].keys() == {"probe_map"}
    for kind in ("lora", "all"):
        run = tmp_path / kind
        more = ("method=finetune", f"finetune.train={kind}", "eval.frozen_baseline=false", "eval.probe=false")
        result = run_target(shards, run, *settings, *more)
        by_hand = scores_by_hand("multilabel", run, shards["test"])
        assert result["adapted"]["head_map"] == pytest.approx(by_hand["map"], abs=1e-4)


def test_predictions(shards: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = data.open_source(shards["test"], require_labels=False)
    pictures = [tmp_path / f"{n}.png" for n in range(3)]
    for number, path in enumerate(pictures):
        path.write_bytes(source.read(number).data)
    for kind, head in (("multilabel", "class"), ("regression", "name")):
        run = tmp_path / kind
        run_target(
            shards, run, f"objective.target={kind}", "method=finetune", "eval.final=false", "train.epochs=1"
        )
        capsys.readouterr()
        assert cli.main(["predict", str(run), *map(str, pictures), "--top", "3"]) in (0, None)
        rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
        loaded = load(run)
        images = torch.stack([loaded.transform(path) for path in pictures])
        outputs = loaded(images)
        if kind == "regression":
            assert [row[head] for row in rows] == ["value"] * 3
            found = np.array([float(row["value"]) for row in rows])
            np.testing.assert_allclose(found, outputs[:, 0].numpy(), rtol=1e-4)
        else:
            first = {row["class"]: float(row["probability"]) for row in rows[:3]}
            by_hand = torch.sigmoid(outputs[0].double())
            assert first == pytest.approx(dict(zip(CLASSES, by_hand.tolist(), strict=True)), abs=1e-4)
    assert loaded.predict([pictures[0]])[0].to_dict()["values"].keys() == {"value"}


def test_what_is_missing_stops_the_run_before_it_trains(shards: dict[str, str], tmp_path: Path) -> None:
    from tests.support.tars import numbered_tars

    (tmp_path / "tars").mkdir()
    numbered_tars(tmp_path / "tars")
    with pytest.raises(ValueError, match=r"data.train: .*sample '000' has no numbers.*docs/targets.md"):
        run_target(
            {"train": str(tmp_path / "tars"), "test": shards["test"]},
            tmp_path / "run",
            "objective.target=regression",
        )
