"""A rank that is slow is seen where the numbers of all ranks are summed anyway."""

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from selfmask_dist.data import Batch
from selfmask_dist.parallel import World
from selfmask_dist.training.meter import Meter
from tests.support.distributed import run_distributed


class Slow(nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, values: Tensor) -> Tensor:
        time.sleep(self.seconds)
        return values


def _batches(number: int, seconds: float) -> Any:
    for _ in range(number):
        time.sleep(seconds)
        yield Batch(
            views=(torch.zeros(2, 3),),
            labels=torch.zeros(2, dtype=torch.long),
            ids=torch.arange(2),
            weights=torch.ones(2),
            global_count=4,
        )


def _measure() -> tuple[dict[str, float], dict[str, list[float]], int]:
    rank = dist.get_rank()
    meter = Meter(World(rank, 2))
    module = Slow(0.05 if rank == 1 else 0.0)
    sums: list[int] = []
    original = dist.all_reduce

    def counted(tensor: Tensor) -> Any:
        sums.append(tensor.numel())
        return original(tensor)

    dist.all_reduce = counted  # type: ignore[assignment]
    try:
        with meter.watching(module):
            for batch in meter.time_waiting(_batches(3, 0.04 if rank == 0 else 0.0)):
                module(torch.zeros(1))
                with torch.no_grad():
                    module(torch.zeros(1))  # an evaluation
                meter.add({"loss": torch.tensor(1.0 + rank)}, batch)
        module(torch.zeros(1))  # no longer
        values = meter.read()
    finally:
        dist.all_reduce = original
    return values, meter.ranks, len(sums)


@pytest.mark.distributed
def test_the_seconds_of_each_rank_ride_on_the_sum_of_the_metrics() -> None:
    for values, ranks, num_sums in run_distributed(_measure):
        assert num_sums == 1
        assert values["loss"] == 3.0
        assert ranks["forward"][0] < 0.02
        assert 0.05 <= ranks["forward"][1] < 0.15
        assert 0.04 <= ranks["data"][0] < 0.14
        assert ranks["data"][1] < 0.02
        assert len(ranks["memory_mib"]) == 2
        assert min(ranks["memory_mib"]) > 10
        assert values["memory_mib"] == max(ranks["memory_mib"])
