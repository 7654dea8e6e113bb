"""Learning rates by step: the formula, and a head that goes first."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from selfmask_dist.cli.train import run
from selfmask_dist.config import load_config
from selfmask_dist.config.conflicts.unread import unread
from selfmask_dist.runs.checkpoint import load_newest
from selfmask_dist.runs.folder import run_path
from selfmask_dist.training.schedule import Schedule, with_reached_rate
from tests.support.tiny_run import write_config, write_tiny_data


def rates(schedule: Schedule, name: str) -> list[float]:
    """Of a group of base rate 2, at every step."""
    optimizer = torch.optim.SGD([{"name": name, "base_lr": 2.0, "params": [torch.zeros(1)]}], lr=0.0)
    found = []
    for step in range(schedule.num_steps):
        schedule.apply(optimizer, step)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_warm_up_then_cosine() -> None:
    expected = [2 * (t + 1) / 4 for t in range(4)]
    expected += [1 + math.cos(math.pi * (t - 4) / 6) for t in range(4, 10)]
    assert rates(Schedule(10, 4), "scores") == pytest.approx(expected)
    assert rates(Schedule(6, 2, "constant"), "scores") == [1.0, 2.0, 2.0, 2.0, 2.0, 2.0]


def test_the_backbone_waits_and_then_has_the_whole_course() -> None:
    schedule = Schedule(13, 4, head_first_steps=3)
    assert rates(schedule, "scores") == [0.0] * 3 + rates(Schedule(10, 4), "scores")
    assert rates(schedule, "head") == rates(Schedule(13, 4), "head")


def momenta_of(tensors: dict[str, torch.Tensor]) -> set[str]:
    names = {key for key in tensors if key.startswith("momentum/")}
    return {"encoder" if ".encoder." in name or "/encoder." in name else "head" for name in names}


def test_masks_stay_whole_without_momentum_while_the_head_learns(tmp_path: Path) -> None:
    """4 steps an epoch, one of them for the head alone."""
    data = write_tiny_data(tmp_path)
    optim = {"score_lr": 200, "head_first_epochs": 1}
    runs = {}
    for name, steps in (("waiting", 4), ("after", 8)):
        path = write_config(tmp_path / name / "config.yaml", data, optim=optim, train={"max_steps": steps})
        config = load_config(path, [f"run.name={name}", "run.overwrite=true"])
        result = run(config)
        found = load_newest(run_path(config) / "checkpoints", report=print)
        assert found is not None
        runs[name] = (result, found[0].tensors, load_file(run_path(config) / "head.safetensors"))
    result, tensors, head = runs["waiting"]
    assert result["mask"]["active"] == 1.0
    scores = {k: v for k, v in tensors.items() if k.startswith("parameters/") and "encoder" in k}
    assert scores
    assert all((tensor == 1).all() for tensor in scores.values())
    assert momenta_of(tensors) == {"head"}
    result, tensors, later = runs["after"]
    assert result["mask"]["active"] < 1.0
    assert momenta_of(tensors) == {"head", "encoder"}
    assert any((head[name] != later[name]).any() for name in head)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.head_first_epochs=2", "train.epochs=2", "optim.warmup_epochs=1"], "leave nothing"),
        (["optim.head_first_epochs=1", "engine.name=deepspeed"], "one partition"),
        (
            [
                "optim.head_first_epochs=1",
                "objective.head=clip_text",
                "backbone.name=open_clip:ViT-B-32/openai",
            ],
            "no head to train",
        ),
        (
            ["optim.head_first_epochs=1", "objective.name=clip", "backbone.name=open_clip:ViT-B-32/openai"],
            "no head to train",
        ),
        (
            ["optim.head_first_epochs=1", "objective.name=nbd"],
            "nbd trains its own before the first step",
        ),
    ],
)
def test_what_does_not_go_together(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(None, overrides)


@pytest.mark.parametrize(("steps", "init"), [(64, 1.0), (400, 0.3)])
def test_a_gradient_of_one_size_and_sign_carries_a_score_as_far_as_asked(steps: int, init: float) -> None:
    config = load_config(None, ["objective.name=nbd", "optim.score_reach=0.8", f"mask.init={init}"])
    schedule = Schedule(steps, warmup_steps=steps // 10)
    rate = with_reached_rate(config, schedule, torch.nn.Linear(1, 1))[0].optim.score_lr
    score = torch.full((), init, requires_grad=True)
    groups = [{"name": "scores", "base_lr": rate, "params": [score]}]
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=config.optim.momentum)
    for step in range(steps):
        schedule.apply(optimizer, step)
        score.grad = torch.ones(())
        optimizer.step()
    moved = (init - score.item()) / init
    assert moved == pytest.approx(0.8, rel=1e-4)


def test_scores_that_are_never_trained_have_no_rate() -> None:
    config = load_config(None, ["objective.name=nbd"])
    with pytest.raises(ValueError, match="head_first_epochs leaves the scores no step"):
        with_reached_rate(config, Schedule(10, head_first_steps=10), torch.nn.Linear(1, 1))


def test_a_rate_that_is_given_wins_over_the_reach_that_an_objective_brings() -> None:
    assert load_config(None, ["objective.name=nbd"]).optim.score_reach == "auto"
    given = load_config(None, ["objective.name=nbd", "optim.score_lr=0.002"])
    assert given.optim.score_reach is None
    assert with_reached_rate(given, Schedule(10), torch.nn.Linear(1, 1)) == (given, "")


@pytest.mark.parametrize(
    ("layers", "reach", "kind"),
    [
        ([torch.nn.Conv2d(3, 8, 2), torch.nn.MultiheadAttention(8, 2)], 1.2, "no convolutional network"),
        ([torch.nn.Conv2d(3, 64, 3), torch.nn.Linear(8, 8)], 0.4, "a convolutional network"),
        (
            [torch.nn.Conv2d(64, 64, 3, groups=64), torch.nn.Conv2d(64, 8, 1)],
            0.15,
            "a convolutional network with depthwise convolutions",
        ),
        # grouped, yet not one channel at a time
        ([torch.nn.Conv2d(64, 64, 3, groups=32)], 0.4, "a convolutional network"),
    ],
)
def test_the_reach_follows_from_the_kind_of_network(
    layers: list[torch.nn.Module], reach: float, kind: str
) -> None:
    given = ["objective.name=nbd", f"optim.score_reach={reach}"]
    configs = [load_config(None, settings) for settings in (["objective.name=nbd"], given)]
    model, schedule = torch.nn.Sequential(*layers), Schedule(100)
    (auto, words), (same, _) = (with_reached_rate(config, schedule, model) for config in configs)
    assert auto.optim.score_lr == same.optim.score_lr
    assert f"{reach:g} times the way to its threshold ({kind})" in words


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["optim.score_reach=1"], "optim.score_reach reckons with gradients of one size"),
        (
            ["objective.name=nbd", "optim.score_reach=1", "optim.score_lr_choices=[0.001,0.003]"],
            "set one to null",
        ),
    ],
)
def test_a_reach_is_refused_where_it_means_nothing(overrides: list[str], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        load_config(None, overrides)


def test_a_rate_beside_a_reach_is_said_to_be_unread() -> None:
    overrides = ["objective.name=nbd", "optim.score_reach=1", "optim.score_lr=0.002"]
    (complaint,) = unread(load_config(None, overrides), overrides)
    assert "optim.score_reach=1.0 is in its place; set that to null" in complaint
