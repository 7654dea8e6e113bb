"""How fast neighbouring nodes exchange gradients, measured in seconds before a run begins.

    nodes 0-1, 2-3, ...   all-reduce   -> GB/s of each pair
    nodes 1-2, 3-4, ...   all-reduce   -> GB/s of each pair

A node whose pairs are all slow is named: a cable, a card or a switch port, which would slow every step of
every rank. Knows nothing of training.
"""

import os
import socket
import statistics
import time
from collections.abc import Mapping

import torch
import torch.distributed as dist

from selfmask_dist.parallel import World
from selfmask_dist.runs.context import RunContext

_BYTES = {"cuda": 256 * 2**20, "cpu": 4 * 2**20}  # of one all-reduce
_REPEATS = 3  # the fastest counts; one more before them sets connections up
_SLOW = 0.7  # of the median of all pairs


def check_fabric(world: World, *, ranks_per_node: int | None = None) -> tuple[dict[str, float], list[str]]:
    """Return the bandwidth of each pair of nodes in GB/s (bytes of the tensor over seconds), and slow nodes.

    Both are empty on one node. Collective: every rank must call.

    Args:
        ranks_per_node: as the launcher's LOCAL_WORLD_SIZE says where it is None; equal on all nodes.
    """
    per_node = ranks_per_node or int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    num_nodes = world.size // per_node
    if num_nodes < 2 or world.size % per_node:
        return {}, []
    names: list[str] = [""] * world.size
    dist.all_gather_object(names, os.environ.get("SLURMD_NODENAME") or socket.gethostname())
    node = world.rank // per_node
    speeds = torch.zeros(num_nodes, dtype=torch.float64, device=world.device)  # of node n with n + 1
    for first in (0, 1):
        pair = node - (node - first) % 2  # the lower node of the two; it may have no partner
        seconds = float("inf")
        if 0 <= pair < num_nodes - 1:
            ranks = list(range(pair * per_node, (pair + 2) * per_node))
            group = dist.new_group(ranks, use_local_synchronization=True)
            seconds = _seconds(world, group)
            dist.destroy_process_group(group)
            if world.rank == ranks[0]:
                speeds[pair] = _BYTES[world.device.type] / seconds / 1e9
        dist.barrier()
    found = world.sum(speeds).tolist()[: num_nodes - 1]
    hosts = names[::per_node]
    pairs = {f"{hosts[n]}-{hosts[n + 1]}": round(found[n], 3) for n in range(num_nodes - 1)}
    return pairs, slow_nodes(hosts, dict(enumerate(found)))


def slow_nodes(hosts: list[str], speeds: Mapping[int, float]) -> list[str]:
    """Return the hosts whose pairs are all much slower than the middle one of all pairs.

    Args:
        speeds: n -> GB/s of nodes n and n + 1. Two nodes have one pair, which cannot be slower than itself.
    """
    limit = _SLOW * statistics.median(speeds.values())
    slow = {n for n, speed in speeds.items() if speed < limit}
    pairs_of = [[n for n in (node - 1, node) if n in speeds] for node in range(len(hosts))]
    suspects = [node for node, pairs in enumerate(pairs_of) if slow.issuperset(pairs)]
    # a first or last node has one pair alone: where its neighbour explains it, the neighbour it is
    inner = [node for node in suspects if len(pairs_of[node]) == 2]
    explained = {n for node in inner for n in pairs_of[node]}
    return [hosts[n] for n in suspects if n in inner or not explained.issuperset(pairs_of[n])]


def report_fabric(context: RunContext) -> None:
    """Measure the network of a run on several nodes, record what was found, and say it to the user.

    Collective: every rank must call.
    """
    start = time.monotonic()
    pairs, slow = check_fabric(context.world)
    if not pairs:
        return
    seconds = round(time.monotonic() - start, 1)
    context.writer.event("fabric", gigabytes_per_second=pairs, slow=slow, seconds=seconds)
    low, high = min(pairs.values()), max(pairs.values())
    context.writer.message(f"fabric   {low:.2f} to {high:.2f} GB/s between neighbour nodes ({seconds:g} s)")
    for host in slow:
        context.writer.message(
            f"WARNING: node {host} is slow to all its neighbours, and so will be each step; leave it out "
            f"with launch.sbatch={{exclude: {host}}}"
        )


def _seconds(world: World, group: dist.ProcessGroup) -> float:
    tensor = torch.zeros(_BYTES[world.device.type] // 4, device=world.device)
    best = float("inf")
    for turn in range(_REPEATS + 1):
        start = time.perf_counter()
        dist.all_reduce(tensor, group=group)
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        if turn:
            best = min(best, time.perf_counter() - start)
    return best
