"""A run whose result is of no use says so at its end, in its files, in its status and in its report."""

import json
from pathlib import Path
from typing import Any

import pytest

from selfmask_dist.cli import main
from selfmask_dist.config import load_config
from selfmask_dist.runs.verdict import below_frozen, closing, judge, judge_cascade
from tests.support.tiny_run import result_of, write_config, write_tiny_data

MEASURED = ["eval.frozen_baseline=true", "eval.final=true"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_tiny_data(tmp_path_factory.mktemp("data"), test=36)


def train(folder: Path, data: dict[str, str], *overrides: str) -> Path:
    path = write_config(folder / "tiny.yaml", data)
    assert main(["train", "--config", str(path), "run.name=a", *overrides]) == 0
    return folder / "a"


def names_of(run: Path) -> list[str]:
    return [entry["name"] for entry in result_of(run)["verdict"]]


MOCO = ["objective.name=moco_v2", "crops.global_count=2", "crops.local_count=0"]
PLANTED = {
    "prunes nothing": (["optim.score_lr=1e-9", "train.epochs=2"], "raise optim.score_lr"),
    "below frozen": (["mask.family=random", "mask.keep=0.002"], "Likely mask.keep=0.002 prunes too much"),
    "loss never fell": (["optim.head_lr=1000", "train.max_steps=3"], "optim.head_lr"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_useless_result_is_called_one_wherever_it_is_shown(
    name: str, tmp_path: Path, data: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    overrides, expected = PLANTED[name]
    run = train(tmp_path, data, *MEASURED, *overrides)
    said = capfd.readouterr().err
    assert name in names_of(run), result_of(run)
    (text,) = [entry["text"] for entry in result_of(run)["verdict"] if entry["name"] == name]
    assert expected in text
    assert "The frozen backbone is the better choice." in text
    assert f"VERDICT: {text}" in said
    assert main(["status", str(run)]) == 0
    assert f"a: {text}" in capfd.readouterr().out
    assert main(["report", str(run)]) == 0
    assert name in (run / "report.html").read_text()


def test_a_good_result_ends_with_its_numbers_and_no_verdict(
    tmp_path: Path, data: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    run = train(tmp_path, data, *MEASURED, "optim.score_lr=50", "train.epochs=4")
    result, said = result_of(run), capfd.readouterr().err
    assert result["verdict"] == []
    frozen, masked = (f"{result[row]['knn5']:.3f}" for row in ("frozen", "adapted"))
    last = said.strip().splitlines()[-1]
    assert last.startswith(f"frozen {frozen} -> masked {masked} (k-NN 5); ")
    assert last.endswith(f"in {run / 'final.mask'}; next: selfmask report {run}")
    assert "VERDICT" not in said
    assert closing(run) == last  # from the files alone
    assert main(["report", str(run)]) == 0
    assert "<h2>Verdict" not in (run / "report.html").read_text()


def test_two_standard_errors_are_of_the_test_images() -> None:
    rows: tuple[dict[str, float], dict[str, float]] = (
        {"knn20": 0.60, "probe": 0.7},
        {"knn20": 0.56, "probe": 0.9},
    )
    assert not below_frozen(*rows, num_test=100, keys="it")  # an error of 0.049
    (found,) = below_frozen(*rows, num_test=10_000, keys="it")
    assert "k-NN 20 0.560 against 0.600 frozen" in found["text"]
    assert "probe" not in found["text"]
    (found,) = below_frozen(rows[1], {"knn20": 0.57, "probe": 0.1}, num_test=500, keys="it")
    assert "probe 0.100 against 0.900" in found["text"]


def metrics(folder: Path, *losses: float) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"step": step, "loss": loss}) for step, loss in enumerate(losses, start=1)]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 9, "monitor/knn20": 0.5}']) + "\n")
    return folder


@pytest.mark.parametrize(
    ("overrides", "active", "losses", "expected"),
    [
        ([], 0.9, (2.0, 1.9), []),
        ([], 0.9, (2.0, 2.5, 2.0), ["loss never fell"]),
        ([], 0.9, (2.0,), []),  # logged once: nothing to hold against
        ([], 0.0, (2.0, 1.9), ["prunes everything"]),
        (["mask.family=topk", "mask.init=normal", "mask.keep=1"], 1.0, (2.0, 1.9), ["prunes nothing"]),
        (["mask.family=binary_connect"], 1.0, (2.0, 1.9), []),  # signs prune nothing by design
        (MOCO, 0.9, (2.0, 2.9), []),  # its queue fills
        (MOCO, 0.9, (2.0, 3.1), ["loss never fell"]),
    ],
)
def test_what_is_said_of_masks_and_losses(
    tmp_path: Path, overrides: list[str], active: float, losses: tuple[float, ...], expected: list[str]
) -> None:
    result: dict[str, Any] = {"mask": {"active": active, "masked_weights": 1000}}
    found = judge(load_config(None, overrides), result, metrics(tmp_path, *losses), num_test=10)
    assert [entry["name"] for entry in found] == expected


def test_a_cascade_is_judged_by_its_best_row_and_its_stages(tmp_path: Path) -> None:
    config = load_config(None, ["method=cascade", "objective.name=swav"])
    views = {"frozen": {"knn20": 0.6}, "self-masked": {"knn20": 0.3}, "unconditional": {"knn20": 0.61}}
    whitened = {"frozen, whitened": {"knn20": 0.9}}
    assert judge_cascade(config, views | whitened, tmp_path, num_test=1000) == []
    views["unconditional"] = {"knn20": 0.4}
    (tmp_path / "expert-0").mkdir()
    entry = {"name": "prunes nothing", "text": "the mask prunes nothing"}
    (tmp_path / "expert-0" / "result.json").write_text(json.dumps({"verdict": [entry]}))
    first, second = judge_cascade(config, views | whitened, tmp_path, num_test=1000)
    assert "its best row is worse than the frozen backbone: k-NN 20 0.400" in first["text"]
    assert second == {"name": "expert-0/prunes nothing", "text": "expert-0: the mask prunes nothing"}
    said = closing(tmp_path, {"method": "cascade", "views": views, "mask": {"bytes": 5}, "verdict": [first]})
    assert said.startswith(f"frozen 0.600 -> unconditional 0.400 (k-NN 20); 5 B in {tmp_path}/cascade.mask; ")
    assert said.endswith(f"VERDICT: {first['text']}")
