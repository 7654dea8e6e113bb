"""Engines against one process: same losses, masks and state, whatever the engine and the world size."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from selfmask_dist.config.sections import EngineConfig
from selfmask_dist.masking import attach, build_family
from selfmask_dist.masking.parametrized import parametrized_attach
from selfmask_dist.parallel import World, build_engine
from selfmask_dist.parallel.bits import pack
from tests.support.distributed import DistributedError, run_distributed
from tests.support.engine_cases import (
    Case,
    batch_of,
    build,
    check_equal,
    frozen_hash,
    reference_of,
    run_case,
    run_cases,
    train_tiny,
)
from tests.support.models import make

pytestmark = pytest.mark.filterwarnings(
    # torch names the type of its own storage when a state crosses processes
    "ignore:TypedStorage is deprecated:UserWarning"
)
FAMILIES = ("timm_vit", "open_clip", "conv")

DETACHED, UNSCALED = (build_family("threshold", scale=scale) for scale in ("detached", "none"))


VARIANTS = [
    Case(family=family, engine=engine) for engine in ("ddp", "fsdp", "bits") for family in FAMILIES
] + [
    Case(engine=engine, **variant)
    for engine in ("fsdp", "bits")
    for variant in (
        {"masks": {"split_qkv": True}},
        {"family": "open_clip", "masks": {"split_qkv": True, "family": DETACHED}},
        {"masks": {"family": UNSCALED}},
        {"views": 2},
        {"options": {"accumulate": 2}},
        {"options": {"clip_norm": 0.5}},
        {"options": {"checkpoint_activations": True}},
        {"masked_head": True},
        {"family": "conv", "batchnorm": "sync"},
    )
] + [
    Case(engine="fsdp", options={"reshard_after_forward": False}),
    Case(engine="fsdp", options={"cpu_offload": True}),
    Case(engine="bits", options={"bucket_mb": 0.004}),
    Case(engine="ddp", masked_head=True),
    Case(engine="ddp", family="conv", batchnorm="sync"),
    Case(engine="ddp", options={"accumulate": 2, "clip_norm": 0.5}),
]  # fmt: skip


@pytest.mark.distributed
def test_two_processes_equal_one() -> None:
    for case, outcome in zip(VARIANTS, run_distributed(run_cases, 2, VARIANTS, timeout=240)[0], strict=True):
        reference = reference_of(case)
        assert 0 < reference.active < 0.999, "the run must prune something"
        check_equal(outcome, reference)


@pytest.mark.distributed
def test_four_processes_equal_one() -> None:
    """Rows that do not divide by four, a shard that cuts q, k and v, and 2 x 2 hybrid sharding."""
    cases = [
        Case(engine="fsdp", family="open_clip", masks={"split_qkv": True}),
        Case(engine="fsdp", masks={"split_qkv": True}, options={"shard_size": 2}),
        Case(engine="bits", masks={"split_qkv": True}),
        Case(engine="fsdp", family="conv", masks={"include": ["conv*.weight", "bn1.*"], "allow_norm": True}),
    ]
    outcomes = run_distributed(run_cases, 4, cases, timeout=240)
    for index, case in enumerate(cases):
        reference = reference_of(case)
        for of_rank in outcomes:
            check_equal(of_rank[index], reference)


def train_tiny_all() -> dict[str, list[float]]:
    return {name: train_tiny(name) for name in ("fsdp", "bits")}


@pytest.mark.distributed
def test_tensors_smaller_than_the_world() -> None:
    reference = train_tiny("ddp")
    assert len(set(reference)) == 5
    for losses in run_distributed(train_tiny_all, 4)[3].values():
        assert losses == pytest.approx(reference, rel=1e-10)


@pytest.mark.distributed
def test_bf16_two_processes_train_as_one_does() -> None:
    """Rounding to bf16 differs with the number of rows at hand, so this bounds, and does not equate."""
    common: dict[str, Any] = {"dtype": torch.float32, "options": {"precision": "bf16"}, "lr": 2.0}
    reference = run_case(Case(**common))
    assert reference.active < 0.9999
    for outcome in run_distributed(run_cases, 2, [Case(engine=name, **common) for name in ("fsdp", "bits")])[
        0
    ]:
        check_equal(outcome, reference, loss=0.02, bits=0.01)
        assert all(t.dtype == torch.float32 for t in outcome.state.parameters.values())


# ---- state


def test_a_state_holds_what_is_trained_and_nothing_frozen() -> None:
    outcome = run_case(Case(family="conv", batchnorm="train", steps=1))
    masked = {f"encoder.{name}" for name in outcome.masks}
    assert set(outcome.state.parameters) == masked | {"head.weight", "head.bias"}
    assert set(outcome.state.momentum) == set(outcome.state.parameters)
    assert {name.rpartition(".")[2] for name in outcome.state.statistics} == {
        "running_mean",
        "running_var",
        "num_batches_tracked",
    }


def test_a_state_that_does_not_fit_is_refused() -> None:
    engine, _ = build(Case())
    state = engine.state()
    del state.parameters["head.bias"]
    with pytest.raises(ValueError, match=r"does not fit what is trained: missing \['head.bias'\]"):
        engine.load_state(state)
    state.parameters["head.bias"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"head.bias has shape \(3,\) in the state and \(5,\) here"):
        engine.load_state(state)


# ---- communication


def count_collectives(name: str) -> dict[str, int]:
    """Calls of a step by kind, for engine `name` and for training the same weights as they are."""
    counts: dict[str, int] = {}
    engine, _ = build(Case(engine=name))
    for step in range(2):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            engine.forward_backward(batch_of(step, dist.get_rank(), 2, dtype=torch.float64))
            engine.step()
    for event in profile.events():
        if event.name.startswith("c10d::"):
            counts[event.name] = counts.get(event.name, 0) + 1
    return counts


@pytest.mark.distributed
def test_masks_add_no_collective_for_each_tensor() -> None:
    """FSDP: a gather per block and pass, a scatter per block; heads with <G, theta>, and sum M."""
    calls = run_distributed(count_collectives, 2, "fsdp")[0]
    gathers = sum(n for kind, n in calls.items() if "allgather" in kind)
    scatters = sum(n for kind, n in calls.items() if "reduce_scatter" in kind)
    reductions = sum(n for kind, n in calls.items() if "allreduce" in kind)
    assert gathers == 2 * 3 - 1 or gathers == 2 * 3, calls  # two blocks and the root, forward and backward
    assert scatters == 2, calls  # the root's own parameters are frozen
    assert reductions == 2, calls


@pytest.mark.distributed
def test_bits_gathers_once_and_reduces_in_buckets() -> None:
    calls = run_distributed(count_collectives, 2, "bits")[0]
    assert sum(n for kind, n in calls.items() if "allgather" in kind) == 1, calls
    assert sum(n for kind, n in calls.items() if "reduce_scatter" in kind) == 1, calls  # one bucket
    assert sum(n for kind, n in calls.items() if "allreduce" in kind) == 1, calls  # <G, theta>, heads


def memory_of(name: str) -> int:
    """Bytes of theta, weights, scores and momentum that this rank keeps under engine `name`."""
    engine, masks = build(Case(engine=name))
    engine.forward_backward(batch_of(0, dist.get_rank(), dist.get_world_size(), dtype=torch.float64))
    engine.step()
    tensors = [t for e in masks.entries for t in (e.piece(e.theta), e.piece(e.weight), e.scores)]
    tensors += [engine.optimizer.state[e.scores]["momentum_buffer"] for e in masks.entries]
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.distributed
def test_what_a_rank_keeps_falls_with_the_world() -> None:
    total = 4 * 8 * sum(m.numel() for m in run_case(Case(steps=1)).masks.values())
    for size in (1, 2, 4):
        for name in ("fsdp", "bits"):
            assert run_distributed(memory_of, size, name) == pytest.approx([total / size] * size, rel=0.05)


@pytest.mark.parametrize("scale", ["through", "detached", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_parametrised_masks_equal_attached_ones(family: str, scale: Any) -> None:
    gradients = []
    for put_on in (attach, parametrized_attach):
        model, preset = make(family)
        masks = put_on(model, include=preset, split_qkv=True, family=build_family("threshold", scale=scale))
        scores = list(masks.parameters())
        for index, tensor in enumerate(scores):
            generator = torch.Generator().manual_seed(index)
            tensor.data.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) - 0.3)
        masks.rewrite()
        batch = batch_of(0, 0, 1, dtype=torch.float64)
        model(batch.views[0]).square().mean().backward()
        gradients.append([tensor.grad.clone() for tensor in scores if tensor.grad is not None])
        assert frozen_hash(masks) == frozen_hash(put_on(make(family)[0], include=preset))
    for attached, parametrised in zip(*gradients, strict=True):
        torch.testing.assert_close(attached, parametrised, rtol=1e-10, atol=1e-14)


# ---- bad input and small parts


def test_what_cannot_run_here_says_so() -> None:
    model, _ = make("conv")
    step = nn.Module()
    step.encoder = model
    for name, message in (
        ("fsdp", "needs a process group"),
        ("deepspeed", "needs a process group"),
    ):
        with pytest.raises(ValueError, match=message):
            build_engine(
                step, encoder=model, world=World(), config=EngineConfig.model_validate({"name": name})
            )
    engine = build_engine(step, encoder=model, world=World(), config=EngineConfig(name="bits"))
    with pytest.raises(ValueError, match="trains masks only; use ddp, fsdp or deepspeed"):
        engine.free(model)


def build_bad_shards() -> None:
    build(Case(engine="fsdp", options={"shard_size": 3}))


@pytest.mark.distributed
def test_a_shard_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(DistributedError, match=r"engine.shard_size 3 does not divide the 2 processes"):
        run_distributed(build_bad_shards, 2)


def test_packed_bits_unpack() -> None:
    mask = torch.rand(64, generator=torch.Generator().manual_seed(0)) > 0.5
    packed = pack(mask)
    assert packed.dtype == torch.uint8
    assert len(packed) == 8
    assert [(int(packed[i // 8]) >> (i % 8)) & 1 for i in range(64)] == mask.long().tolist()


def test_the_clipped_norm_is_that_of_all_gradients() -> None:
    engine, masks = build(Case())
    engine.forward_backward(batch_of(0, 0, 1, dtype=torch.float64))
    parameters = [*masks.parameters(), *engine.module.get_submodule("head").parameters()]
    grads = [p.grad for p in parameters if p.grad is not None]
    assert len(grads) == len(parameters)
    norm = math.sqrt(sum(float(g.square().sum()) for g in grads))
    assert engine.clip(1e-3).item() == pytest.approx(norm)
    assert math.sqrt(sum(float(g.square().sum()) for g in grads)) == pytest.approx(1e-3, rel=1e-3)
