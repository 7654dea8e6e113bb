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
    left += _left_in_groups()
    return max(min(left), 0) // max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)


def _left_in_groups() -> list[int]:
    """Return what is left of the limits of this process's control groups (version 2), pages of files taken as
    free; nothing where there are none.
    """
    found = []
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        place = Path(next(line for line in lines if line.startswith("0::")).removeprefix("0::/"))
        for group in (place, *place.parents):  # a batch system may set the limit on a group above
            folder = Path("/sys/fs/cgroup") / group
            with suppress(OSError, ValueError):
                limit = int((folder / "memory.max").read_text())  # "max" is no number: no limit
                used = int((folder / "memory.current").read_text())
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                found.append(limit - used + int(stat["active_file"]) + int(stat["inactive_file"]))
    return found


def least_free_mib(ranks: Ranks, device: torch.device) -> int:
    """Return the MiB that every rank can still take. Collective: every rank must call."""
    free = torch.zeros(ranks.size, dtype=torch.int64, device=device)
    free[ranks.rank] = free_bytes(device) // _MIB
    return int(ranks.sum(free).min())
