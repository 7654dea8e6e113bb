"""One rank reads all weights for the others, and none goes on with other weights than that one."""

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from selfmask_dist.backbones import load_backbone, sample_of
from selfmask_dist.parallel import World, is_lost_peer, join_world, take_from_main
from tests.support.distributed import run_distributed


def _agree() -> tuple[str, str]:
    world = World(rank=dist.get_rank(), size=dist.get_world_size())
    weights = {"a": torch.arange(100_000.0), "b": torch.ones(3)}
    found = take_from_main(
        world, "the fingerprint" if world.is_main else "", sample=sample_of(weights), what="weights"
    )
    if world.rank == 1:
        weights["a"][-20_000:] = 0  # a file whose end is not written yet
    try:
        take_from_main(world, "x" if world.is_main else "", sample=sample_of(weights), what="the weights")
    except ValueError as error:
        return found, str(error)
    return found, ""


@pytest.mark.distributed
def test_a_rank_takes_what_the_main_one_found_and_refuses_other_weights() -> None:
    (first, nothing), (second, refused) = run_distributed(_agree)
    assert first == second == "the fingerprint"
    assert nothing == ""
    assert "the weights of rank 1 differ from those of rank 0" in refused


def test_a_rank_that_reads_no_weights_has_the_same_ones_without_a_fingerprint() -> None:
    whole = load_backbone("timm:test_vit", pretrained=False)
    trusting = load_backbone("timm:test_vit", pretrained=False, reads_all=False)
    assert trusting.spec.fingerprint == ""
    assert whole.spec.fingerprint
    assert sample_of(trusting.encoder.state_dict()) == sample_of(whole.encoder.state_dict())
    other = load_backbone("timm:test_vit", pretrained=False, seed=1, reads_all=False)
    assert sample_of(other.encoder.state_dict()) != sample_of(whole.encoder.state_dict())


def test_a_sample_sees_names_shapes_and_ends() -> None:
    weight = torch.arange(20_000.0)
    found = sample_of({"a": weight})
    assert found == sample_of({"a": weight.double()})
    assert found != sample_of({"b": weight})
    assert found != sample_of({"a": weight.reshape(2, -1)})
    for place in (0, -1):
        changed = weight.clone()
        changed[place] += 1
        assert found != sample_of({"a": changed})


def _leave_a_hung_peer() -> tuple[bool, float]:
    """Rank 0 waits in a collective; rank 1 has a bug, and leaves."""
    start = time.monotonic()
    try:
        with join_world("cpu", timeout=timedelta(seconds=60)) as world:
            world.barrier()
            start = time.monotonic()
            if world.rank == 1:
                raise KeyError("a bug")
            world.sum(torch.ones(4))
    except Exception as error:
        return is_lost_peer(error), time.monotonic() - start
    return False, 0.0


@pytest.mark.distributed
def test_after_an_error_the_group_is_left_at_once() -> None:
    (is_lost, waited), (is_lost_here, left) = run_distributed(_leave_a_hung_peer, backend="")
    assert is_lost
    assert not is_lost_here
    assert waited < 20
    assert left < 5
