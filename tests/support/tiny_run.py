"""The smallest run there is: 48 noisy pictures of three colours and a two-block ViT on 16 pixels."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from ruamel.yaml import YAML

from data_prep.image_folder import convert_image_folder
from tests.support.bytecode import keep_bytecode

ROOT = Path(__file__).resolve().parents[2]
COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}

SETTINGS: dict[str, Any] = {
    "backbone": {
        "name": "timm:vit_tiny_patch16_224",
        "pretrained": False,
        "image_size": 16,
        "crop_pct": 1.0,
        "kwargs": {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    },
    "train": {"epochs": 2, "global_batch_size": 12},
    "eval": {"knn_k": [5], "knn_every": 0, "frozen_baseline": False, "probe": False},
    "engine": {"device": "cpu", "workers": 0, "threads": 1},
    "run": {"progress": False, "log_every": 1},
}


def write_tiny_data(folder: Path, *, train: int = 48, test: int = 12) -> dict[str, str]:
    """Shards of `train` and `test` pictures; returns the `data` section."""
    rng = np.random.default_rng(0)
    for split, number in (("train", train), ("test", test)):
        for index in range(number):
            name = list(COLOURS)[index % len(COLOURS)]
            pixels = np.clip(rng.normal(COLOURS[name], 40, size=(16, 16, 3)), 0, 255).astype(np.uint8)
            path = folder / "images" / split / name / f"{index:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    convert_image_folder(folder / "images", folder / "shards")
    return {split: str(folder / "shards" / split) for split in ("train", "test")}


def write_config(path: Path, data: dict[str, str], **sections: Any) -> Path:
    """The settings above with `sections` on top, as a YAML file; runs go into the folder beside it."""
    settings = {**SETTINGS, "data": data}
    for name, values in {"run": {"dir": str(path.parent)}, **sections}.items():
        old = settings.get(name)
        settings[name] = {**old, **values} if isinstance(old, dict) else values
    settings["run"] = {"dir": str(path.parent), **settings["run"]}
    path.parent.mkdir(parents=True, exist_ok=True)
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.dump(settings, path)
    return path


def child_environment(**extra: str) -> dict[str, str]:
    """Return this process's environment, with compiled modules kept and connections on this machine."""
    environment = dict(os.environ)
    keep_bytecode(environment)
    return {**environment, "GLOO_SOCKET_IFNAME": "lo", **extra}


def submit_command(config: Path, *arguments: str, nodes: int = 2, cluster: str = "local") -> list[str]:
    command = [sys.executable, str(ROOT / "launchers" / "submit.py"), "--cluster", cluster]
    plan = (
        ["--plan-seconds", "0"] if cluster == "slurm" else []
    )  # it imports torch; `arguments` may ask for it
    return [*command, "--nodes", str(nodes), *plan, "--config", str(config), *arguments]


def submit(
    config: Path, *arguments: str, nodes: int = 2, cluster: str = "local", timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run the launcher to its end."""
    return subprocess.run(
        submit_command(config, *arguments, nodes=nodes, cluster=cluster),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env=child_environment(),
    )


def result_of(run: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((run / "result.json").read_text())
    return value


def processes_of(folder: Path) -> dict[int, str]:
    """Living processes whose command line names `folder`, by id."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            state = (path.parent / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if str(folder) in command and state != "Z" and int(path.parent.name) != os.getpid():
            found[int(path.parent.name)] = command
    return found


def rank_process(folder: Path, rank: int, name: str) -> int:
    """The process id of a rank of run `name`."""
    for pid, command in processes_of(folder).items():
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        if (
            "selfmask_dist.cli" in command
            and f"run.name={name}" in command
            and f"RANK={rank}".encode() in variables
        ):
            return pid
    raise AssertionError(f"no process of rank {rank}")


def wait_until(condition: Callable[[], object], seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def events_of(run: Path) -> list[dict[str, Any]]:
    path = run / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def steps_of(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    return [line["step"] for line in lines if "loss" in line]
