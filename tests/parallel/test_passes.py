"""Several resolutions in one pass through each block, and micro-batches that are reduced one by one."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from selfmask_dist.backbones.any_size import accept_sizes
from selfmask_dist.parallel import Engine
from selfmask_dist.parallel.together import take_several
from tests.support.distributed import run_distributed
from tests.support.engine_cases import (
    BLOCKS,
    Case,
    batch_of,
    build,
    check_equal,
    reference_of,
    run_cases,
)
from tests.support.models import make

pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
SIDES = (16, 16, 8, 8, 8)
MIXED: dict[str, Any] = {"sides": SIDES}
CASES = [
    Case(engine="fsdp", **MIXED),
    Case(engine="fsdp", family="open_clip", options={"checkpoint_activations": True}, **MIXED),
    Case(engine="fsdp", family="conv", batchnorm="sync", **MIXED),
    Case(engine="bits", options={"accumulate": 2, "checkpoint_activations": True}, **MIXED),
    Case(engine="bits", family="conv", batchnorm="sync", **MIXED),
]  # fmt: skip


@pytest.mark.distributed
def test_resolutions_together_equal_a_forward_for_each() -> None:
    for case, outcome in zip(CASES, run_distributed(run_cases, 2, CASES, timeout=240)[0], strict=True):
        reference = reference_of(case)  # ddp, which makes a forward for each
        assert 0 < reference.active < 0.999, "the run must prune something"
        check_equal(outcome, reference)


@pytest.mark.distributed
def test_replicas_of_shards_accumulate() -> None:
    case = Case(engine="fsdp", options={"shard_size": 2, "accumulate": 2}, **MIXED)
    for outcomes in run_distributed(run_cases, 4, [case], timeout=240):
        check_equal(outcomes[0], reference_of(case))


@pytest.mark.distributed
@pytest.mark.slow
def test_deepspeed_takes_resolutions_together() -> None:
    options = {"zero_stage": 3, "accumulate": 2}
    case = Case(engine="deepspeed", dtype=torch.float32, options=options, **MIXED)
    for outcomes in run_distributed(run_cases, 2, [case], timeout=240):
        check_equal(outcomes[0], reference_of(case), loss=1e-5, bits=1e-4)


# ---- what travels, and when


def calls_of(engine: Engine, **batch: Any) -> dict[str, int]:
    """Collectives of a second step by kind."""
    counts: dict[str, int] = {}
    for step in range(2):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            engine.forward_backward(
                batch_of(step, dist.get_rank(), dist.get_world_size(), dtype=torch.float64, **batch)
            )
            engine.step()
    for event in profile.events():
        if event.name.startswith("c10d::"):
            kind = event.name.removeprefix("c10d::").strip("_")
            counts[kind] = counts.get(kind, 0) + 1
    return counts


def count_calls() -> list[dict[str, int]]:
    one, many = Case(engine="fsdp"), Case(engine="fsdp", **MIXED)
    twice = Case(engine="fsdp", options={"accumulate": 2})
    return [
        calls_of(build(one)[0]),
        calls_of(build(many)[0], sides=SIDES),
        calls_of(build(twice)[0]),
    ]


@pytest.mark.distributed
def test_more_resolutions_take_no_more_calls_and_micro_batches_are_reduced_at_once() -> None:
    one, many, twice = run_distributed(count_calls, 2)[0]
    assert many == one
    scatters = [sum(n for kind, n in calls.items() if "reduce_scatter" in kind) for calls in (one, twice)]
    assert scatters == [2, 4], (one, twice)  # two blocks, and as often for each micro-batch


def order_in_backward(name: str) -> list[str]:
    """What happened in which order: `upper done` as a weight of the upper block has its whole gradient,
    `lower begins` when the lower block gets the gradient of one of its outputs.
    """
    engine, _ = build(Case(engine=name, **MIXED))
    upper, lower = (engine.encoder.get_submodule(block) for block in reversed(BLOCKS["timm_vit"]))
    events: list[str] = []

    def watch(_: nn.Module, __: Any, outputs: list[Tensor]) -> None:
        for output in outputs:
            output.register_hook(lambda _: events.append("lower begins"))
        weight = upper.get_parameter("mlp.fc1.weight")
        weight.register_hook(lambda _: events.append("upper done"))

    lower.register_forward_hook(watch)
    # fsdp's weights are whole, and what autograd sees, while the block runs
    world = dist.get_world_size()
    engine.forward_backward(batch_of(0, dist.get_rank(), world, dtype=torch.float64, sides=SIDES))
    return events


@pytest.mark.distributed
def test_a_block_is_done_before_the_one_below_begins() -> None:
    assert run_distributed(order_in_backward, 2, "bits")[0] == ["upper done", *["lower begins"] * 2]


def kept_between(name: str) -> list[int]:
    """Numbers in gradients of theta that are kept whole when a micro-batch is over."""
    engine, masks = build(Case(engine=name, options={"accumulate": 2}))
    kept: list[int] = []
    backward = engine._backward

    def looking(loss: Tensor) -> None:
        backward(loss)
        grads = [entry.theta.grad for entry in masks.entries]
        local = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
        states = [m._get_fsdp_state() for m in engine.encoder.modules() if isinstance(m, FSDPModule)]
        waiting = [
            one.unsharded_accumulated_grad
            for state in states
            for group in state._fsdp_param_groups
            for one in group.fsdp_params
        ]
        kept.append(sum(grad.numel() for grad in [*local, *waiting] if grad is not None))

    engine._backward = looking  # type: ignore[method-assign]
    engine.forward_backward(batch_of(0, dist.get_rank(), dist.get_world_size(), dtype=torch.float64))
    return kept


@pytest.mark.distributed
def test_between_micro_batches_a_rank_keeps_its_share_of_gradients() -> None:
    masks = build(Case())[1]
    total = sum(entry.theta.numel() for entry in masks.entries)
    first, last = run_distributed(kept_between, 2, "fsdp")[0]
    assert first == last == pytest.approx(total / 2, rel=0.1)
    assert run_distributed(kept_between, 2, "bits")[0] == [0, 0]  # in buckets that were reduced


# ---- the forwards that advance together


class Picky(nn.Module):
    """An encoder that skips a block, or fails, for pictures of some sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True)) for _ in range(3))

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-1] == 5:
            raise ValueError("five pixels")
        x = images.mean(dim=(2, 3))
        for index, block in enumerate(self.blocks):
            if index != 1 or images.shape[-1] != 8:
                x = block(x)
        return x if torch.is_grad_enabled() else x + 100


def picky() -> nn.Module:
    model = Picky()
    take_several(model, ["blocks.0", "blocks.1", "blocks.2"])
    return model


def test_a_size_may_take_a_way_of_its_own() -> None:
    model = picky()
    images = [torch.randn(2, 3, side, side) for side in (4, 8, 16)]
    together = model(images)
    alone = [model(one) for one in images]
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a, b)
    grads = [
        torch.autograd.grad(sum(one.square().sum() for one in many), list(model.parameters()))
        for many in (together, alone)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_state_of_the_thread_goes_along_and_errors_come_back() -> None:
    model = picky()
    images = [torch.randn(2, 3, side, side) for side in (4, 8)]
    with torch.no_grad():
        assert all(float(one.min()) >= 100 for one in model(images))
    with torch.autocast("cpu", torch.bfloat16):
        assert [one.dtype for one in model(images)] == [torch.bfloat16] * 2
    with pytest.raises(ValueError, match="five pixels"):
        model([images[0], torch.randn(2, 3, 5, 5)])
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model([images[0], torch.randn(2, 4, 8, 8)])
    assert len(model(images)) == 2, "and the next call is as if nothing had been"


def test_a_vit_with_masked_weights_computes_the_same_to_the_bit() -> None:
    model, _ = make("timm_vit")
    accept_sizes(model, (8, 16), name="vit")
    images = [torch.randn(2, 3, side, side, dtype=torch.float64) for side in (16, 8)]
    alone = [model(one) for one in images]
    take_several(model, BLOCKS["timm_vit"])
    for a, b in zip(model(images), alone, strict=True):
        assert torch.equal(a, b)
