"""PackNet, lottery tickets and Knowledge Evolution as runs: chains of stages that go on where they were."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from selfmask_dist.cli.train import run
from selfmask_dist.config import ConfigError, load_config
from selfmask_dist.training.build import build_backbone
from tests.support.distributed import run_distributed
from tests.support.procedure_cases import RESNET, packed_theta, start
from tests.support.tiny_run import result_of, steps_of, write_config, write_tiny_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_tiny_data(tmp_path_factory.mktemp("data"))


def test_packnet_keeps_every_task_to_the_bit(tmp_path: Path, data: dict[str, str]) -> None:
    """On a network with batch normalisation; the second start finds all stages done."""
    options: dict[str, Any] = {"method": "packnet", "backbone": RESNET}
    options |= {"procedure": {"tasks": 3, "keep": 0.5, "include": "resnet"}, "optim": {"weight_lr": 0.05}}
    result, folder = start(tmp_path, data, "packed", **options)
    assert [task["classes"] for task in result["tasks"]] == [["blue"], ["green"], ["red"]]
    stored = load_file(folder / "packed.safetensors")
    owners = {n.removeprefix("owners/"): t for n, t in stored.items() if n.startswith("owners/")}
    weights = {n: t for n, t in stored.items() if not n.startswith("owners/")}
    ends = [load_file(folder / f"task-{task}-retrain" / "encoder.safetensors") for task in (1, 2, 3)]
    encoder = build_backbone(load_config(folder / "config.yaml")).encoder.eval()
    images = torch.randn(4, 3, 16, 16)
    for task, end in enumerate(ends, start=1):
        theta = weights | packed_theta(weights, owners, task)
        assert theta.keys() == end.keys()
        for (
            name,
            tensor,
        ) in end.items():  # what the task ended with; norms and statistics are the first task's
            assert torch.equal(tensor, theta[name]), name
        encoder.load_state_dict(end)
        expected = encoder(images)
        encoder.load_state_dict(theta)
        assert torch.equal(encoder(images), expected)
    for first, second in itertools.pairwise(ends):
        assert any(not torch.equal(first[name], second[name]) for name in owners)
        changed = {name for name, tensor in second.items() if not torch.equal(tensor, first[name])}
        assert changed <= set(owners)
    assert result["adapted"]["head"] == pytest.approx(sum(t["head"] for t in result["tasks"]) / 3)

    before = (folder / "task-3-retrain" / "metrics.jsonl").stat().st_mtime_ns
    (folder / "result.json").unlink()
    again, _ = start(tmp_path, data, "packed", **options)
    assert again == result
    assert (folder / "task-3-retrain" / "metrics.jsonl").stat().st_mtime_ns == before


def test_lottery_goes_on_from_step_k_under_each_mask(tmp_path: Path, data: dict[str, str]) -> None:
    options: dict[str, Any] = {"method": "lottery", "optim": {"weight_lr": 0.05}}
    options["procedure"] = {"rounds": 2, "prune": 0.5, "rewind_steps": 2}
    result, folder = start(tmp_path, data, "ticket", **options)
    assert [round(part["left"], 3) for part in result["rounds"]] == [1.0, 0.5, 0.25]
    assert steps_of(folder / "round-2") == [3, 4]  # of 4 in all
    at_k = load_file(folder / "rewind" / "encoder.safetensors")
    ticket = load_file(folder / "ticket.safetensors")
    codes = load_file(folder / "round-2-codes.safetensors")
    end = load_file(folder / "round-2" / "encoder.safetensors")
    for name, tensor in ticket.items():
        kept = codes[name] == 1 if name in codes else torch.ones_like(tensor, dtype=torch.bool)
        assert torch.equal(tensor, at_k[name] * kept)
        assert not end[name][~kept].any()

    # the first round is the dense run from the start, to the bit: going on from step k changes nothing
    whole, _ = start(tmp_path, data, "dense", method="finetune", optim={"weight_lr": 0.05})
    dense = load_file(tmp_path / "dense" / "encoder.safetensors")
    first = load_file(folder / "round-0" / "encoder.safetensors")
    assert all(torch.equal(tensor, first[name]) for name, tensor in dense.items())
    assert whole["adapted"] == {k: v for k, v in result["rounds"][0].items() if k != "left"}

    # an interrupted chain: the last round is lost, and made again
    shutil.rmtree(folder / "round-2")
    (folder / "result.json").unlink()
    again, _ = start(tmp_path, data, "ticket", **options)
    assert again == result
    assert all(
        torch.equal(tensor, end[name])
        for name, tensor in load_file(folder / "round-2" / "encoder.safetensors").items()
    )


def _run_rank(config: Path) -> None:
    run(load_config(config, ["run.name=ticket"]))


@pytest.mark.distributed
def test_two_processes_hold_the_same_weights(tmp_path: Path, data: dict[str, str]) -> None:
    options: dict[str, Any] = {"method": "lottery", "optim": {"weight_lr": 0.05}, "train": {"epochs": 0.5}}
    options["procedure"] = {"rounds": 1, "prune": 0.5, "rewind_steps": 1}
    alone, folder = start(tmp_path / "alone", data, "ticket", **options)
    config = write_config(tmp_path / "both" / "x.yaml", data, **options)
    run_distributed(_run_rank, 2, config, backend="", timeout=120)
    both = tmp_path / "both" / "ticket"
    codes = load_file(both / "round-1-codes.safetensors")
    first, second = (load_file(run / "round-1" / "encoder.safetensors") for run in (folder, both))
    for name, tensor in second.items():
        torch.testing.assert_close(tensor, first[name], rtol=1e-4, atol=1e-5)
        if name in codes:
            assert not tensor[codes[name] != 1].any()
    assert [r["left"] for r in result_of(both)["rounds"]] == [r["left"] for r in alone["rounds"]]


def test_evolution_ends_in_a_slim_network(tmp_path: Path, data: dict[str, str]) -> None:
    options: dict[str, Any] = {"method": "evolution", "backbone": RESNET, "optim": {"weight_lr": 0.05}}
    options["procedure"] = {"generations": 2, "split_rate": 0.5}
    result, folder = start(tmp_path, data, "evolved", **options)
    parent = load_file(folder / "generation-0" / "encoder.safetensors")
    child = load_file(folder / "generation-1-start.safetensors")
    end = load_file(folder / "generation-1" / "encoder.safetensors")
    slim = load_file(folder / "fit.safetensors")
    key = "layer1.0.conv2.weight"
    assert torch.equal(child[key][:4, :4], parent[key][:4, :4])
    assert (child[key][4:] != parent[key][4:]).all()
    assert (child[key][:4, 4:] != parent[key][:4, 4:]).all()
    assert torch.equal(slim[key], end[key][:4, :4])
    assert result["costs"]["fit"]["parameters"] < result["costs"]["dense"]["parameters"] * 0.35
    assert result["fit"].keys() == {"knn5"}
    assert len(result["generations"]) == 2
    assert result_of(folder) == result
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"


def test_evolution_of_a_vit_splits_weights(tmp_path: Path, data: dict[str, str]) -> None:
    options: dict[str, Any] = {"method": "evolution"}
    options["procedure"] = {"generations": 2, "split": "wels", "split_rate": 0.8}
    result, folder = start(tmp_path, data, "split", **options)
    fit = load_file(folder / "fit.safetensors")
    key = "blocks.0.mlp.fc1.weight"
    assert int((fit[key] != 0).sum()) == round(0.8 * fit[key].numel())
    assert result["costs"] == {}


def test_held_weights_are_refused_where_weights_are_cut(tmp_path: Path, data: dict[str, str]) -> None:
    path = write_config(tmp_path / "x.yaml", data)
    for overrides, complaint in (
        (["method=lottery", "engine.name=fsdp"], "set engine.name=ddp"),
        (["method=mask", "procedure.hold=x.safetensors"], "of method=finetune"),
        (["method=packnet", "objective.name=swav"], "objective.name=supervised"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            load_config(path, overrides)
    with pytest.raises(ValueError, match="3 classes to share out"):
        start(tmp_path, data, "many", method="packnet", procedure={"tasks": 4})
    with pytest.raises(ValueError, match="cannot be read"):
        start(
            tmp_path, data, "lost", method="finetune", procedure={"hold": str(tmp_path / "none.safetensors")}
        )
