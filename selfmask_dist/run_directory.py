"""A run is a directory: `config.yaml` (starts the run again), `environment.json`, metrics, events, masks,
`result.json`.
"""

import json
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from selfmask_dist.config import Config, to_yaml

# what a run directory may hold; anything else in it is not ours to delete
_OWN_FILES = (
    *("config.yaml", "environment.json", "metrics.jsonl", "events.jsonl", "result.json"),
    *("*.mask", "*.safetensors", "failure-*.pt", "*.png", "wandb"),
)
_PACKAGES = ("torch", "torchvision", "timm", "open_clip_torch", "numpy", "selfmask_dist")


def create_run_directory(config: Config) -> Path:
    """Make the run's directory and write what started it.

    Raises:
        ValueError: there is a run already and `run.overwrite` is false, or the directory holds foreign files.
    """
    directory = run_path(config)
    if (directory / "config.yaml").exists():
        if not config.run.overwrite:
            raise ValueError(
                f"{directory} holds a run already; set run.name to another name, or run.overwrite=true"
            )
        for pattern in _OWN_FILES:
            for path in directory.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").write_text(to_yaml(config))
    write_json(directory / "environment.json", environment())
    return directory


def run_path(config: Config) -> Path:
    return Path(config.run.dir) / config.run.name


def write_json(path: Path, value: Any) -> None:
    """Write JSON by way of a temporary name, so that a reader never sees half a file."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")
    partial.replace(path)


def environment() -> dict[str, Any]:
    """Versions, machine and code state that a run depended on."""
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "machine": {"system": platform.platform(), "processor": platform.processor() or platform.machine()},
        "git": {
            "commit": _git("rev-parse", "HEAD"),
            "is_dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        },
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
