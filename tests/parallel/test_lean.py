"""Halves for what is frozen, scores stepped tensor by tensor, scores and momentum in bf16."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from selfmask_dist.parallel.lean.sgd import LeanSGD, round_at_random
from tests.support.distributed import run_distributed
from tests.support.engine_cases import (
    Case,
    Outcome,
    batch_of,
    build,
    check_equal,
    difference,
    run_case,
    run_cases,
)

HALF = {"precision": "bf16", "weights": "bf16"}


def case(options: dict[str, Any], **more: Any) -> Case:
    return Case(dtype=torch.float32, options=options, **more)


def same(one: Outcome, other: Outcome, parts: tuple[str, ...] = ("parameters", "momentum")) -> None:
    assert one.losses == other.losses
    for part in parts:
        own, others = getattr(one.state, part), getattr(other.state, part)
        assert own.keys() == others.keys()
        for name in own:
            assert torch.equal(own[name], others[name]), (part, name)


@pytest.mark.parametrize(
    "more", [{}, {"masked_head": True}, {"family": "conv"}, {"masks": {"split_qkv": True}}]
)
def test_stepping_in_backward_equals_stepping_all_at_the_end(more: dict[str, Any]) -> None:
    # a norm that nothing reaches keeps all gradients until the step, and changes none
    whole = run_case(case({**HALF, "clip_norm": 1e9}, **more))
    assert 0.02 < whole.active < 0.999
    same(run_case(case(HALF, **more)), whole)


def test_score_step_rms_tensor_by_tensor_equals_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    one = case({**HALF, "score_step": "rms"}, lr=0.3)
    by_tensor = run_case(one)
    monkeypatch.setattr("selfmask_dist.parallel.ddp.ByTensor", lambda *_, **__: None)
    at_once = run_case(one)
    assert 0.02 < at_once.active < 0.98
    same(by_tensor, at_once)


def test_bf16_weights_are_near_float32_ones() -> None:
    exact, lean = run_case(case({"precision": "bf16"}, lr=5.0)), run_case(case(HALF, lr=5.0))
    loss, bits = difference(lean, exact)
    assert 0 < loss < 0.01
    assert bits < 0.001 < 0.003 < 1 - exact.active
    assert lean.frozen_before == lean.frozen_after


def test_gradients_are_gone_one_by_one() -> None:
    engine, masks = build(case(HALF))
    alive: list[int] = []
    for entry in masks.entries:
        entry.theta.register_hook(
            lambda _: alive.append(sum(e.theta.grad is not None for e in masks.entries))
        )
    before = [entry.scores.detach().clone() for entry in masks.entries]
    thetas = [entry.theta.detach().clone() for entry in masks.entries]
    engine.forward_backward(batch_of(0, 0, 1, dtype=torch.float32))
    assert len(alive) == len(masks.entries)
    assert max(alive) == 0
    assert all(entry.theta.grad is None and entry.scores.grad is None for entry in masks.entries)
    assert all(not torch.equal(entry.scores, old) for entry, old in zip(masks.entries, before, strict=True))
    assert all(torch.equal(entry.theta, old) for entry, old in zip(masks.entries, thetas, strict=True))
    engine.step()
    assert any(not torch.equal(entry.theta, old) for entry, old in zip(masks.entries, thetas, strict=True))
    matrices = [entry for entry in masks.entries if entry.theta.ndim > 1]
    assert (
        {entry.theta.dtype for entry in matrices}
        == {entry.weight.dtype for entry in matrices}
        == {torch.bfloat16}
    )
    assert {entry.scores.dtype for entry in masks.entries} == {torch.float32}


def test_a_loss_that_is_no_number_moves_no_score() -> None:
    engine, masks = build(case(HALF))
    batch = batch_of(0, 0, 1, dtype=torch.float32)
    batch.views[0][0, 0, 0, 0] = math.nan
    before = [entry.scores.detach().clone() for entry in masks.entries]
    metrics = engine.forward_backward(batch)
    assert not metrics["loss"].isfinite()
    assert all(torch.equal(entry.scores, old) for entry, old in zip(masks.entries, before, strict=True))


def test_adamw_tensor_by_tensor_equals_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    adamw = torch.optim.AdamW
    monkeypatch.setattr(
        torch.optim, "SGD", lambda groups, momentum: adamw(groups, betas=(momentum, 0.99), weight_decay=0.0)
    )
    by_tensor, whole = (run_case(case(options, lr=0.3)) for options in (HALF, {**HALF, "clip_norm": 1e9}))
    assert by_tensor.state.second_moment
    same(by_tensor, whole, ("parameters", "momentum", "second_moment", "num_updates"))


# ---- the optimizer


def test_lean_sgd_is_torchs() -> None:
    results = []
    for kind in (torch.optim.SGD, LeanSGD):
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.randn(7, 5)), nn.Parameter(torch.randn(3))]
        groups: list[dict[str, Any]] = [
            {"params": parameters[:1], "lr": 0.3},
            {"params": parameters[1:], "lr": 0.1, "weight_decay": 0.01},
        ]
        more: dict[str, Any] = {"seed": 0} if kind is LeanSGD else {}
        optimizer = kind(groups, momentum=0.9, **more)
        for _ in range(5):
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        results.append([*parameters, *(optimizer.state[p]["momentum_buffer"] for p in parameters)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_scores_in_bf16_move_by_less_than_they_can_hold() -> None:
    scores = nn.Parameter(torch.ones(1 << 19, dtype=torch.bfloat16))  # two pieces of noise
    optimizer = LeanSGD([{"params": [scores], "lr": 1e-4, "in_bf16": True}], momentum=0.9, seed=3)
    optimizer.names = {id(scores): "a"}
    steps = 0
    optimizer.clock = lambda: steps
    for steps in range(50):  # noqa: B007  # the clock reads it
        optimizer.step_tensor(optimizer.param_groups[0], scores, torch.ones(1 << 19))
    exact, moved = 1.0, 0.0
    for _ in range(50):
        moved = 0.9 * moved + 1
        exact -= 1e-4 * moved
    assert scores.float().mean().item() == pytest.approx(exact, abs=2e-4)
    assert 0.9 < exact < 0.97
    assert optimizer.state[scores]["momentum_buffer"].dtype == torch.bfloat16


def test_rounding_at_random_is_a_function_of_place_and_key() -> None:
    values = torch.linspace(-3, 3, 1001)
    whole = round_at_random(values.clone(), 5, 0)
    parts = [round_at_random(values[first : first + 100].clone(), 5, first) for first in range(0, 1001, 100)]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(round_at_random(values.clone(), 6, 0), whole)
    assert ((whole.float() - values).abs() <= values.abs() * 2**-7).all()
    odd = torch.tensor([math.inf, -math.inf, 0.0, 1.0])
    assert torch.equal(round_at_random(odd.clone(), 1, 0), odd.bfloat16())
    noisy = torch.full((100_000,), 1 + 2**-9)  # a quarter of the way up
    assert round_at_random(noisy, 1, 0).float().mean().item() == pytest.approx(1 + 2**-9, abs=5e-5)


# ---- several processes


@pytest.mark.distributed
def test_two_processes_are_near_one() -> None:
    cases = [case(HALF, lr=5.0), case({**HALF, "score_step": "rms"}, lr=0.1)]
    for one, outcome in zip(cases, run_distributed(run_cases, 2, cases)[1], strict=True):
        check_equal(outcome, run_case(one), loss=0.02, bits=0.02)
