"""What this machine and its cluster say of themselves: for a site file (`selfmask site init`), and for a job.

GPUs, CPUs, memory and time limits come from `sinfo`, or from this machine where there is no SLURM; data and
runs go to the shared folder that the environment names. What could not be found out stays as a comment in the
file. Nothing is asked.
"""

import os
import subprocess
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from selfmask_dist.config import Config
from selfmask_dist.config.site import DATA_VARIABLE
from selfmask_dist.config.yaml import flow

from .local import visible_gpus

# where clusters keep what is large and shared; the first that is a folder
_SHARED = ("SCRATCH", "WORK", "PROJECT", "SHARED", "GROUP_HOME")


@dataclass(frozen=True)
class Partition:
    """What `sinfo` says of one: nodes, and of each its CPUs, memory and GPUs; hours None without a limit."""

    name: str
    nodes: int
    cpus: int
    memory_gb: int
    gpus: int
    hours: float | None
    is_default: bool


def describe_site() -> str:
    """Return the text of a site file for this place."""
    partitions = read_partitions()
    gpus = [part for part in partitions if part.gpus]
    chosen = max(gpus or partitions, key=lambda part: (part.is_default, part.nodes), default=None)
    lines = [
        "# What this place says for all runs, below their own configuration; written by `selfmask site init`."
    ]
    shared = next(
        (Path(os.environ[name]) for name in _SHARED if Path(os.environ.get(name, "")).is_absolute()), None
    )
    if shared is None or not shared.is_dir():
        lines += ["", "# no shared folder is named by " + ", ".join(f"${name}" for name in _SHARED), "# run:"]
        lines += ["#   dir: /shared/runs"]
    else:
        lines += ["", "run:", f"  dir: {flow(str(shared / 'selfmask' / 'runs'))}"]
    lines += ["", *_launch(chosen, partitions)]
    data = os.environ.get(DATA_VARIABLE)
    root = flow(data or str((shared or Path("/shared")) / "selfmask" / "data"))
    lines += ["", "site:", f"  data_root: {root} # data.train=NAME is NAME/train in it"]
    lines += [
        "  # data: {photos: /elsewhere/photos}",
        "  # weights: {timm:resnet50.a1_in1k: /weights/resnet50.safetensors}",
    ]
    if cache := os.environ.get("HF_HOME"):
        lines.append(f"  hub_cache: {flow(cache)}")
    loaded = [name for name in os.environ.get("LOADEDMODULES", "").split(":") if name]
    lines.append(f"  modules: {flow(loaded)}" if loaded else "  # modules: [cuda]")
    return "\n".join(lines) + "\n"


def _launch(chosen: Partition | None, partitions: list[Partition]) -> list[str]:
    if chosen is None:
        gpus = len(visible_gpus())
        found = f"{gpus} GPU(s)" if gpus else "no GPU"
        processes = "0 # one for each GPU" if gpus else "1"
        return [
            f"# no SLURM answers here; this machine has {found}",
            "launch:",
            f"  processes_per_node: {processes}",
        ]
    lines = [f"# {line}" for line in map(_in_words, partitions)]
    lines += ["launch:", f"  partition: {flow(chosen.name)}"]
    if chosen.gpus:
        each = max(chosen.cpus // chosen.gpus, 1)
        lines += [f"  gpus_per_node: {chosen.gpus}", "  processes_per_node: 0 # one for each GPU"]
        lines.append(f"  cpus_per_process: {each}")
    if chosen.hours is not None:
        lines.append(f"  hours: {min(chosen.hours, 24.0):g} # of a start; the job is requeued and goes on")
    return [*lines, "  # account: NAME", "  # qos: NAME"]


def _in_words(part: Partition) -> str:
    limit = "no time limit" if part.hours is None else f"{part.hours:g} h"
    default = ", the default" if part.is_default else ""
    return (
        f"partition {part.name}: {part.nodes} node(s) of {part.gpus} GPUs, {part.cpus} CPUs, "
        f"{part.memory_gb} GB; {limit}{default}"
    )


def read_partitions() -> list[Partition]:
    """Return what `sinfo` says of each partition, the least of what its nodes have; empty without SLURM."""
    command = ["sinfo", "--noheader", "--format=%P|%D|%c|%m|%G|%l"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    found: dict[str, Partition] = {}
    for line in done.stdout.splitlines() if done.returncode == 0 else []:
        name, nodes, cpus, memory, gres, limit = line.strip().split("|")
        plain = name.rstrip("*")
        part = Partition(
            name=plain,
            nodes=int(nodes),
            cpus=int(cpus.rstrip("+")),
            memory_gb=int(memory.rstrip("+")) // 1024,
            gpus=gpus_of(gres),
            hours=hours_of(limit),
            is_default=name.endswith("*"),
        )
        known = found.get(plain)
        found[plain] = part if known is None else _smaller(known, part)
    return list(found.values())


def ask_cluster(config: Config, said: Collection[str], partitions: Sequence[Partition]) -> list[str]:
    """Return the overrides that make a job ask for the GPUs and CPUs that its partition's nodes have: one
    process for each GPU, and for each process CPUs for its workers and itself.

    Args:
        said: the keys that were given, which stay as they are.
    """
    launch = config.launch
    part = next(
        (p for p in partitions if (p.name == launch.partition if launch.partition else p.is_default)), None
    )
    if part is None or not part.gpus or config.engine.device == "cpu":
        return []
    found = {
        "launch.gpus_per_node": part.gpus,
        "launch.processes_per_node": 0,
        "launch.cpus_per_process": max(min(config.engine.workers + 1, part.cpus // part.gpus), 1),
    }
    return [f"{key}={value}" for key, value in found.items() if key not in said]


def _smaller(a: Partition, b: Partition) -> Partition:
    return replace(
        a,
        nodes=a.nodes + b.nodes,
        cpus=min(a.cpus, b.cpus),
        memory_gb=min(a.memory_gb, b.memory_gb),
        gpus=min(a.gpus, b.gpus),
    )


def gpus_of(gres: str) -> int:
    """Return the GPUs in a node's generic resources, such as `gpu:h100:8(S:0-1),nvme:1`."""
    for entry in gres.split(","):
        kind, *rest = entry.partition("(")[0].split(":")
        if kind == "gpu":
            return int(rest[-1]) if rest and rest[-1].isdigit() else 1
    return 0


def hours_of(limit: str) -> float | None:
    """Return SLURM's `days-hours:minutes:seconds` in hours; None for `infinite`."""
    if not limit[:1].isdigit():
        return None
    days, _, clock = limit.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    # with days the clock begins with hours, without them it ends with seconds
    hours, minutes, seconds = [*parts, 0, 0][:3] if days else [0, 0, *parts][-3:]
    return round(int(days or 0) * 24 + hours + minutes / 60 + seconds / 3600, 2)
