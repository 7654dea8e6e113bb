"""Memory of nbd's bank and softmax on each rank, by the number of ranks: it falls as 1 / world.

Every rank holds its share of N pictures' rows, moments and targets, and computes three steps on a global
batch of 128 embeddings of 384 dimensions (no backbone: that is the engines' benchmark). Counted is the growth
of a rank's resident memory at its highest over what it was with a bank of a few pictures, against what
`selfmask plan` reckons; the plan of 1,000,000 pictures stands beside.

    python -m benchmarks.evidence.bank_memory [--quick] --json
"""

import ctypes
import gc
import sys

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.harness import Benchmark
from benchmarks.parallel.memory import OwnMemory, resident
from selfmask_dist.cli.plan.hardware import Hardware
from selfmask_dist.cli.plan.steps import bank_bytes
from selfmask_dist.config import load_config
from selfmask_dist.config.objectives import NbdConfig
from selfmask_dist.data import Batch
from selfmask_dist.objectives import Context, Nbd
from selfmask_dist.parallel import World
from tests.support.distributed import run_distributed

DIM, BATCH = 384, 128


def steps(num_pictures: int, exact_up_to: int, sampled: int) -> None:
    """Three steps of the objective on random features."""
    world = World(dist.get_rank(), dist.get_world_size())
    context = Context(
        world.rank, world.size, BATCH, world.sum, world.sum_with_gradient, num_samples=num_pictures
    )
    objective = Nbd(DIM, NbdConfig(exact_up_to=exact_up_to, sampled=sampled), context)
    generator = torch.Generator().manual_seed(0)
    objective.weight = torch.randn(DIM, objective.dim, generator=generator)
    objective.bank.rows = torch.randn(len(objective.bank.rows), objective.dim, generator=generator)
    rows = BATCH // world.size
    for step in range(3):
        ids = torch.arange(world.rank, BATCH, world.size) % num_pictures
        images = torch.randn(rows, DIM, generator=generator)
        objective.start_step(step)
        loss, _ = objective(nn.Identity(), Batch((images,), -torch.ones(rows), torch.ones(rows), ids, BATCH))
        loss.backward()
        objective.after_step()


def grown(num_pictures: int, exact_up_to: int, sampled: int) -> int:
    """The bytes that a rank's memory grows by."""
    ctypes.CDLL(None).mallopt(-3, 65536)  # M_MMAP_THRESHOLD: what is freed goes back at once
    steps(1000, exact_up_to, 256)  # what libraries take once
    gc.collect()
    before = resident("RssAnon")
    own = OwnMemory()
    own.start()
    steps(num_pictures, exact_up_to, sampled)
    return own.finish() - before


def main() -> int:
    bench = Benchmark("bank_memory", __doc__)
    is_quick = bench.parse().quick
    num = 20_000 if is_quick else 200_000
    for label, exact_up_to, sampled in (("exact", num, 1), ("sampled", 1, num // 8)):
        first = 0.0
        for world in (1, 2) if is_quick else (1, 2, 4):
            most = max(run_distributed(grown, world, num, exact_up_to, sampled, timeout=500))
            first = first or float(most)
            keys = [f"nbd.exact_up_to={exact_up_to}", f"nbd.sampled={sampled}", "objective.name=nbd"]
            reckoned = bank_bytes(load_config(None, keys), Hardware(pictures=num, gpus_per_node=world))
            bench.figure(f"{label}, world {world}: MiB", most / 2**20)
            limits = {"max": 1.25, "min": 0.6}
            bench.figure(f"{label}, world {world}: over the plan's", most / reckoned, quick=False, **limits)
            if world > 1:
                bench.figure(
                    f"{label}, world {world}: share of one rank's, times {world}",
                    most / first * world,
                    max=1.3,
                    quick=False,
                )
    for world in (8, 32):
        planned = bank_bytes(load_config(None, ["objective.name=nbd"]), Hardware(gpus_per_node=world))
        bench.figure(f"planned, 1,000,000 pictures, world {world}: MiB", planned / 2**20)
    bench.figure("pictures", num)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
