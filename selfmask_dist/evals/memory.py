"""How much memory is free for an evaluation's workspace: of a GPU, or this process's share of a machine."""

import os
from contextlib import suppress
from pathlib import Path

import torch

from selfmask_dist.evals.ranks import Ranks

_MIB = 2**20


def free_bytes(device: torch.device) -> int:
    """Return the bytes that this process can still take on a device.

    On a CPU the processes of a node share what is left of the machine, or of the control group that a batch
    system put them in. Where nothing is known, it is as if there were 64 GiB.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    left = [64 * 1024 * _MIB]
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found = next(line for line in lines if line.startswith("MemAvailable:"))
        left = [int(found.split()[1]) * 1024]
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        place = next(line for line in lines if line.startswith("0::")).removeprefix("0::/")
        group = Path("/sys/fs/cgroup") / place
        limit, used = ((group / f"memory.{name}").read_text() for name in ("max", "current"))
        left.append(int(limit) - int(used))  # "max" is no number: no limit
    return max(min(left), 0) // max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)


def least_free_mib(ranks: Ranks, device: torch.device) -> int:
    """Return the MiB that every rank can still take. Collective: every rank must call."""
    free = torch.zeros(ranks.size, dtype=torch.int64, device=device)
    free[ranks.rank] = free_bytes(device) // _MIB
    return int(ranks.sum(free).min())
