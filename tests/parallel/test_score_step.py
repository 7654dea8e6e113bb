"""The score step `rms` under every engine: one process, two and four, and a run that was stopped."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from selfmask_dist.masking import build_family
from selfmask_dist.masking.families.base import Family
from selfmask_dist.masking.families.threshold import Threshold
from tests.support.distributed import DistributedError, run_distributed
from tests.support.engine_cases import (
    Case,
    Outcome,
    batch_of,
    build,
    check_equal,
    reference_of,
    run_case,
    run_cases,
)

pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
ENV = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}  # with ninja
RMS = {"score_step": "rms"}
Calls = list[tuple[int, int]]
RATE = 0.3  # of four steps: scores move by about the first score


class Unshifted(Threshold):
    """A family that does not say what back sums add: squares then travel by themselves."""

    name = "unshifted"
    shift = Family.shift


def case(engine: str, **more: Any) -> Case:
    options = {**RMS, **more.pop("options", {})}
    return Case(engine=engine, options=options, **{"lr": RATE, **more})


VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"family": "open_clip", "masks": {"split_qkv": True}},
    {"family": "conv", "masks": {"family": build_family("threshold", scale="detached")}},
    {"masks": {"family": build_family("threshold", maskable=0.5)}},
    {"family": "conv", "masks": {"family": build_family("edge_popup", keep=0.7), "init": "normal"}},
    {"options": {"accumulate": 2}},
    {"options": {"clip_norm": 0.01}},
)
CASES = [case(engine, **variant) for engine in ("fsdp", "bits") for variant in VARIANTS] + [
    case("ddp"),
    case("ddp", masked_head=True),
    case("fsdp", masked_head=True),
    case("bits", masks={"family": Unshifted()}),
    case("fsdp", masks={"family": build_family("joint")}),
]
FOUR = [
    case("ddp", options={"clip_norm": 0.01}),
    case("fsdp", family="odd_vit", masks={"split_qkv": True}),
    case("fsdp", options={"shard_size": 2}),
    case("bits", family="odd_vit"),
]


def check(cases: list[Case], outcomes: list[Outcome], **bounds: float) -> None:
    for one, outcome in zip(cases, outcomes, strict=True):
        reference = reference_of(one)
        assert 0.02 < reference.active < 0.98, (one, reference.active)
        check_equal(outcome, reference, **bounds)


def count(engine_name: str, score_step: str) -> tuple[int, int]:
    """Calls of collectives in a step, and the numbers that the sharded masks' sums take."""
    engine, masks = build(case(engine_name, options={"score_step": score_step}))
    for step in range(2):
        batch = batch_of(step, dist.get_rank(), 2, dtype=torch.float64)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            engine.forward_backward(batch)
            engine.step()
    masks._passes.score_step = score_step
    for entry in masks.entries:
        entry.theta.grad = None
    return sum(event.name.startswith("c10d::") for event in profile.events()), len(masks.back_sums())


FLOAT32 = [case(engine, dtype=torch.float32) for engine in ("ddp", "fsdp", "bits")]
BF16: dict[str, Any] = {"dtype": torch.float32, "lr": 0.1, "options": {"precision": "bf16"}}


def stopped(one: Case) -> Outcome:
    """The second half of a case, from the state that its first half left."""
    state = run_case(Case(**{**vars(one), "steps": 2})).state
    return run_case(Case(**{**vars(one), "steps": 2, "start": 2, "state": state}))


def all_of_two() -> tuple[list[Outcome], list[Outcome], list[Outcome], list[Outcome], dict[str, Calls]]:
    """All that two processes are to do, as starting them takes longest."""
    in_bf16 = run_cases([case(engine, **BF16) for engine in ("fsdp", "bits")])
    counts = {name: [count(name, step) for step in ("plain", "rms")] for name in ("fsdp", "bits")}
    return run_cases(CASES), run_cases(FLOAT32), [stopped(one) for one in FLOAT32], in_bf16, counts


@pytest.mark.distributed
def test_two_processes_equal_one() -> None:
    outcomes, in_float32, gone_on, in_bf16, counts = run_distributed(all_of_two, 2, timeout=300)[1]
    check(CASES, outcomes)
    # squares travel with the heads' gradients, in their dtype
    check(FLOAT32, in_float32, loss=1e-5, bits=1e-4)
    for whole, half in zip(in_float32, gone_on, strict=True):
        check_goes_on(whole, half)
    reference = run_case(case("ddp", **BF16))
    assert reference.active < 0.999
    for outcome in in_bf16:  # rounding differs with the rows at hand, so this bounds
        check_equal(outcome, reference, loss=0.02, bits=0.02)
    for (calls, numbers), (rms_calls, rms_numbers) in counts.values():
        assert rms_calls == calls, "squares travel with the sums that travel anyway"
        assert rms_numbers == 4 * numbers  # <G, theta>; and sum u^2, sum u, count


def check_goes_on(whole: Outcome, half: Outcome) -> None:
    """A run that was stopped ends bit for bit like the other, though nothing is kept for the score step."""
    assert whole.losses[2:] == half.losses
    for part in ("parameters", "momentum"):
        first, second = getattr(whole.state, part), getattr(half.state, part)
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.distributed
def test_four_processes_equal_one() -> None:
    for outcomes in run_distributed(run_cases, 4, FOUR, timeout=240):
        check(FOUR, outcomes)


DEEPSPEED = [
    case("deepspeed", dtype=torch.float32, family=family, options={"zero_stage": stage})
    for stage, family in ((1, "conv"), (2, "timm_vit"), (3, "timm_vit"), (3, "conv"))
] + [
    case("deepspeed", dtype=torch.float32, options={"zero_stage": 2, "accumulate": 2}),
    case("deepspeed", dtype=torch.float32, masked_head=True, options={"zero_stage": 2}),
]


@pytest.mark.distributed
def test_deepspeed_equals_one_process() -> None:
    for outcomes in run_distributed(run_cases, 2, DEEPSPEED, timeout=300, env=ENV):
        check(DEEPSPEED, outcomes, loss=1e-4, bits=1e-3)


# ---- what is clipped, and what is left alone


def test_clipping_is_for_what_is_not_normalised() -> None:
    engine, masks = build(case("ddp"))
    engine.forward_backward(batch_of(0, 0, 1, dtype=torch.float64))
    scores = [p.grad.clone() for p in masks.parameters() if p.grad is not None]
    heads = [p for p in engine.module.get_submodule("head").parameters() if p.grad is not None]
    norm = torch.stack([p.grad.norm() for p in heads if p.grad is not None]).norm()
    assert engine.clip(1e-3).item() == pytest.approx(norm.item())
    clipped = torch.stack([p.grad.norm() for p in heads if p.grad is not None]).norm()
    assert clipped.item() == pytest.approx(1e-3, rel=1e-2)
    for parameter, before in zip(masks.parameters(), scores, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, before)
        assert before.square().mean().item() == pytest.approx(1, rel=1e-9)


def clip_under_deepspeed() -> None:
    build(case("deepspeed", dtype=torch.float32, options={"clip_norm": 1.0}))


@pytest.mark.distributed
def test_deepspeed_refuses_to_clip() -> None:
    with pytest.raises(DistributedError, match=r"score_step=rms only those besides the scores' are to be"):
        run_distributed(clip_under_deepspeed, 1, env=ENV)


def test_weights_that_stand_for_scores_keep_their_gradients() -> None:
    """Latent weights are trained at the weights' rate; `bind` by hand says that there is nothing to do."""
    engine, masks = build(Case(options=RMS, masks={"family": build_family("binary_connect")}, lr=0.1))
    plain, others = build(Case(masks={"family": build_family("binary_connect")}, lr=0.1))
    for one in (engine, plain):
        one.forward_backward(batch_of(0, 0, 1, dtype=torch.float64))
    for first, second in zip(masks.parameters(), others.parameters(), strict=True):
        assert first.grad is not None
        assert second.grad is not None
        assert torch.equal(first.grad, second.grad)
    with pytest.raises(ValueError, match="the family binary_connect trains none"):
        masks.bind(torch.optim.SGD(masks.parameters(), lr=1.0), score_step="rms")
