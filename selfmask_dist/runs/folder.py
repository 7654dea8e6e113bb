"""A run is a directory: `config.yaml` (which starts the run again), `environment.json`, metrics, events,
masks, `result.json`. The names of its files are in `common.names`.
"""

import json
import platform
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from selfmask_dist.common import names
from selfmask_dist.common.files import write_json, write_text
from selfmask_dist.common.text import some
from selfmask_dist.config import Config, flat_science, load_config, to_yaml
from selfmask_dist.runs.owner import identity

# what a run directory may hold; anything else in it is not ours to delete
_OWN_FILES = (
    *(names.CONFIG, names.ENVIRONMENT, names.METRICS, names.EVENTS, names.STATUS, names.RESULT, names.FROZEN),
    *(names.QUARANTINE, names.CHECKPOINTS, names.STACKS, names.REPORT, names.EMBEDDINGS, names.EVAL),
    *("*.mask", "*.safetensors", "failure-*.pt", "*.png", "wandb"),
    *(names.DISPATCHER, names.ROUTER, names.expert("*"), names.COMBINATION, names.VIEWS, "stop-*"),
    *(names.MODEL, names.RETRIEVAL, names.SCORE_LR, names.trial("*"), names.MEASURING),
    # of procedures
    *("task-*", "rewind", "round-*", "generation-*", "fit.json", "inferred-*.json"),
    *("adapted", "fit.npy", "alpha-*.json", "first", "second", "barrier-*.json", "reached-*.json"),
    *("member-*", "masks.json", "small_models.json"),
)
_PACKAGES = ("torch", "torchvision", "timm", "open_clip_torch", "numpy", "selfmask_dist")


def create_run_directory(config: Config, *, is_restart: bool = False) -> Path:
    """Make the run's directory and write what started it, or go on in the one there is.

    Args:
        is_restart: the launcher starts the same run again.

    Raises:
        ValueError: as `check_start`.
    """
    directory = run_path(config)
    check_start(config, is_restart=is_restart)
    if (directory / names.CONFIG).exists():
        if is_restart or config.run.resume:
            return directory
        _delete_own_files(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / names.CONFIG).write_text(to_yaml(config))
    write_json(directory / names.ENVIRONMENT, environment())
    return directory


def check_start(config: Config, *, is_restart: bool = False) -> None:
    """Do nothing where a run may begin in its folder, or go on there.

    Args:
        is_restart: the launcher starts the same run again.

    Raises:
        ValueError: there is a run already and neither `run.overwrite` nor `run.resume` is set, there is none
            to resume, or the run to resume was another one.
    """
    directory = run_path(config)
    if (directory / names.CONFIG).exists():
        if is_restart or config.run.resume:
            _check_same_run(config, load_config(directory / names.CONFIG))
        elif not config.run.overwrite and not came_to_nothing(directory):
            raise ValueError(
                f"{directory} holds a run already; set run.name to another name, run.resume=true to go on "
                f"with it, or run.overwrite=true"
            )
    elif config.run.resume and not is_restart:
        others = sorted(path.parent.name for path in Path(config.run.dir).glob(f"*/{names.CONFIG}"))
        there = f"; in {config.run.dir} there are {some(others)}" if others else ""
        raise ValueError(
            f"run.resume=true and {directory} holds no run{there}. Set run.dir and run.name to one "
            f"that there is, or leave run.resume out to begin a new run"
        )


def is_finished(config: Config, *, is_restart: bool = False) -> bool:
    """Return whether a run that is to go on has nothing left to do."""
    goes_on = is_restart or config.run.resume
    return goes_on and (run_path(config) / names.RESULT).exists()


def note_failed_start(config: Config) -> None:
    """Write into a run's folder that it failed, where the run did not come so far as to do so itself."""
    directory = run_path(config)
    if (directory / names.CONFIG).exists() and not (directory / names.STATUS).exists():
        write_json(directory / names.STATUS, {**identity(), "state": "failed", "time": time.time()})


def came_to_nothing(directory: Path) -> bool:
    """Return whether a folder's run failed before it, or a stage of it, had measured or trained anything.

    Such a run blocks no name: the user mends what was wrong and starts again.
    """
    try:
        if json.loads((directory / names.STATUS).read_text())["state"] != "failed":
            return False
    except (OSError, ValueError, KeyError, TypeError):
        return False
    results = (
        names.METRICS,
        names.FROZEN,
        names.RESULT,
        f"{names.CHECKPOINTS}/step-*",
        "*.mask",
        "*.safetensors",
    )
    made = [path for name in results for place in ("", "*/") for path in directory.glob(place + name)]
    has_stores = (directory / names.EMBEDDINGS).exists()
    return not has_stores and not any(path.is_dir() or path.stat().st_size for path in made)


def _delete_own_files(directory: Path) -> None:
    for pattern in _OWN_FILES:
        for path in directory.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def drop_metrics_after(directory: Path, step: int) -> None:
    """Forget the lines of `metrics.jsonl` beyond a step: training goes on there and writes them again."""
    path = directory / names.METRICS
    if not path.exists():
        return
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    if len(kept) < len(lines):
        write_text(path, "".join(kept))


def _check_same_run(config: Config, before: Config) -> None:
    for key, now in flat_science(config).items():
        if flat_science(before)[key] != now:
            raise ValueError(
                f"{run_path(config)} was started with {key}={flat_science(before)[key]!r} and not {now!r}; "
                f"results would be of neither. Put it back, or set run.name to another name"
            )


def remove_measured(config: Config, what: str = "") -> None:
    """Delete what the run's own evaluation kept for a restart, of one encoder or of all; its numbers are
    written. For the main process.
    """
    if not config.eval.keep_embeddings:
        shutil.rmtree(run_path(config) / names.MEASURING / what, ignore_errors=True)


def run_path(config: Config) -> Path:
    """Return the run's folder."""
    return Path(config.run.dir) / config.run.name


def environment() -> dict[str, Any]:
    """Return the versions, the machine and the state of the code that a run depended on."""
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
