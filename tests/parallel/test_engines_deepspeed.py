"""The DeepSpeed engine against one process, and what it says where it cannot run."""

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.support.distributed import DistributedError, run_distributed
from tests.support.engine_cases import (
    Case,
    Outcome,
    build,
    check_equal,
    reference_of,
    run_case,
    run_cases,
    train_tiny,
)

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
]
ENV = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}  # with ninja
COMMON = {"engine": "deepspeed", "dtype": torch.float32}
CASES = [
    Case(**COMMON, family=family, options={"zero_stage": stage})  # type: ignore[arg-type]
    for stage in (2, 3)
    for family in ("conv", "timm_vit")
] + [
    Case(**COMMON, family="conv", options={"zero_stage": 2, "accumulate": 2}),  # type: ignore[arg-type]
    Case(**COMMON, family="conv", options={"zero_stage": 3, "clip_norm": 0.5}),  # type: ignore[arg-type]
]


def check_cases(cases: list[Case], world_size: int) -> None:
    for outcomes in run_distributed(run_cases, world_size, cases, timeout=300, env=ENV):
        for case, outcome in zip(cases, outcomes, strict=True):
            reference = reference_of(case)
            assert reference.active < 0.999, "the run must prune something"
            check_equal(outcome, reference, loss=1e-5, bits=1e-4)
            check_momentum(outcome, reference)


def check_momentum(outcome: Outcome, reference: Outcome) -> None:
    for name, momentum in reference.state.momentum.items():
        torch.testing.assert_close(outcome.state.momentum[name], momentum, rtol=1e-3, atol=1e-5)


def test_stages_2_and_3_equal_one_process() -> None:
    check_cases(CASES, 2)


@pytest.mark.slow
def test_all_stages_equal_one_process() -> None:
    cases = [
        Case(**COMMON, family=family, options={"zero_stage": stage})  # type: ignore[arg-type]
        for stage in (1, 2, 3)
        for family in ("conv", "odd_vit", "open_clip")
    ]
    for size in (1, 2, 4):
        check_cases(cases, size)


def train_tiny_stages() -> list[list[float]]:
    return [train_tiny("deepspeed", torch.float32, zero_stage=stage) for stage in (2, 3)]


def test_tensors_smaller_than_the_world() -> None:
    reference = train_tiny("ddp", torch.float32)
    for losses in run_distributed(train_tiny_stages, 4, timeout=120, env=ENV)[3]:
        assert losses == pytest.approx(reference, rel=1e-5)


# ---- bad input


def refuse_missing_ninja() -> list[str]:
    """On GPUs operators are built when it starts; on CPUs nothing is built, and no ninja is needed."""
    from selfmask_dist.parallel.deepspeed import _import_deepspeed

    os.environ["PATH"] = "/nowhere"
    build(Case(engine="deepspeed", dtype=torch.float32, family="conv"))
    with pytest.raises(ValueError, match="finds no ninja on PATH; pip install ninja"):
        _import_deepspeed("cuda")
    return [str(dist.get_world_size())]


def test_missing_ninja_is_named() -> None:
    assert run_distributed(refuse_missing_ninja, 1, env=ENV) == [["1"]]


def build_without_deepspeed() -> None:
    sys.modules["deepspeed"] = None  # type: ignore[assignment]  # importing it now fails, as if not installed
    run_case(Case(engine="deepspeed"))


def test_a_missing_deepspeed_is_named() -> None:
    with pytest.raises(
        DistributedError, match=r"engine.name=deepspeed needs deepspeed, which .*; bring it in with"
    ):
        run_distributed(build_without_deepspeed, 1)
