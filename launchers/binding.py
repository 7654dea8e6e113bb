"""The CPUs of a node that are near a process's GPU: where its threads and data workers are to run.

    local rank -> CUDA_VISIBLE_DEVICES -> nvidia-smi: PCI address -> /sys: NUMA node -> its CPUs

Pictures are decoded into memory and copied to the GPU; over the other socket's link that is slower, and it is
one link for all. SLURM's own binding is kept: only CPUs that the process may use anyway are taken, and
nothing is bound where these are elsewhere, where there is one NUMA node, or where nobody says.
"""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

_QUERY = ["nvidia-smi", "--query-gpu=index,uuid,pci.bus_id", "--format=csv,noheader"]
_SECONDS = 20.0  # for nvidia-smi, which is slow where no driver daemon runs


def cpus_near_gpu(
    local_rank: int, environment: Mapping[str, str], allowed: set[int], *, system: Path = Path("/sys")
) -> set[int]:
    """Return those of the allowed CPUs that are near the GPU of a local rank; empty where nobody knows.

    Args:
        environment: of the process, for CUDA_VISIBLE_DEVICES.
        system: where Linux tells of devices.
    """
    address = _address(local_rank, environment)
    if address is None:
        return set()
    try:
        text = (system / "bus" / "pci" / "devices" / address / "local_cpulist").read_text()
        return cpus_of(text) & allowed
    except (OSError, ValueError):
        return set()


def bind_near_gpu(local_rank: int, environment: Mapping[str, str]) -> str:
    """Bind this process, and what it starts from now on, and return a line on it; empty where it does not."""
    allowed = os.sched_getaffinity(0)
    near = cpus_near_gpu(local_rank, environment, allowed)
    if not near or near == allowed:
        return ""
    os.sched_setaffinity(0, near)
    return f"bound to {len(near)} of {len(allowed)} CPUs, near its GPU (launch.bind=false: to none)"


def cpus_of(text: str) -> set[int]:
    """Return the CPUs of Linux's list, such as `0-3,8`.

    Raises:
        ValueError: it is not one.
    """
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def _address(local_rank: int, environment: Mapping[str, str]) -> str | None:
    """Return the PCI address of a rank's GPU as Linux writes it, `0000:17:00.0`; None where nobody says."""
    try:
        done = subprocess.run(_QUERY, capture_output=True, text=True, check=True, timeout=_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return None
    rows = [[word.strip() for word in line.split(",")] for line in done.stdout.splitlines()]
    known = {name: row[2] for row in rows if len(row) == 3 for name in row[:2]}
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    gpus = [row[0] for row in rows] if visible is None else visible.split(",")
    if local_rank >= len(gpus) or gpus[local_rank].strip() not in known:
        return None  # a part of a GPU, or one that another job has
    domain, _, rest = known[gpus[local_rank].strip()].lower().partition(":")
    return f"{domain[-4:]}:{rest}"  # nvidia-smi writes the domain with eight digits, Linux with four
