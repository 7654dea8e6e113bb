"""What runs are doing, from their files alone: `selfmask status`, `logs` and `checkpoints`.

    runs/NAME/status.json (heartbeat)  result.json  checkpoints/  logs/rank-R.log

Works while a run runs and after, on any machine that sees the folder. Knows nothing of training.
"""

import argparse
import collections
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_SILENT_SECONDS = 60.0
_COLUMNS = ("run", "state", "step", "loss", "images/s", "restarts", "checkpoint", "heartbeat", "job")
_RIGHT = ("step", "loss", "images/s", "restarts", "size")  # columns of numbers


# ---- writing


class Heartbeat:
    """Keeps `status.json`; only the main rank has one.

    Args:
        newest: returns the newest step and its numbers.
        parent: the run that this one is a stage of; its status is then this one's.
        facts: more to state, as the stage's name.
    """

    def __init__(
        self, run: Path, newest: Callable[[], dict[str, Any]], *, parent: Path | None = None, **facts: Any
    ) -> None:
        self._runs = [run] if parent is None else [run, parent]
        self._newest = newest
        self._facts: dict[str, Any] = {
            "state": "running",
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "job": os.environ.get("SLURM_JOB_ID"),
            "restarts": int(os.environ.get("SELFMASK_RESTARTS", 0)),
            **facts,
        }

    def write(self, silence: float = 0.0, **facts: Any) -> None:
        """`silence`: seconds since something moved. A full disk does not stop a run here."""
        self._facts |= facts
        newest = self._newest()
        numbers = {name: newest.get(name) for name in ("step", "loss", "images_per_second")}
        values = {**self._facts, **numbers, "time": time.time(), "silence": round(silence, 1)}
        try:
            for run in self._runs:
                partial = run / ".status.json.partial"
                partial.write_text(json.dumps(values) + "\n")
                partial.replace(run / "status.json")
        except OSError as error:
            print(f"status.json could not be written: {error}", file=sys.stderr)


# ---- reading


def read_status(run: Path) -> dict[str, str]:
    """One line of the table, every value as text.

    Raises:
        ValueError: the folder is not a run's.
    """
    if not (run / "config.yaml").exists():
        raise ValueError(f"{run} is not a run: it has no config.yaml")
    status = _json(run / "status.json")
    numbers = {name: value for name, value in status.items() if isinstance(value, int | float)}
    age = time.time() - numbers["time"] if "time" in numbers else None
    step, total = _progress(run, status)
    return {
        "run": run.name,
        "state": _state(run, status, age, numbers.get("silence", 0.0)),
        "step": "-" if step is None else f"{step}" + (f"/{total}" if total else ""),
        "loss": f"{numbers['loss']:.4f}" if "loss" in numbers else "-",
        "images/s": f"{numbers['images_per_second']:.0f}" if "images_per_second" in numbers else "-",
        "restarts": str(numbers.get("restarts", "-")),
        "checkpoint": _newest_checkpoint(run),
        "heartbeat": "-" if age is None else f"{_duration(age)} ago",
        "job": str(status.get("job") or "-"),
    }


def _state(run: Path, status: dict[str, Any], age: float | None, silence: float) -> str:
    if (run / "result.json").exists():
        return "finished"
    state = str(status.get("state", "no heartbeat"))
    if state == "running":
        if age is None or age > _SILENT_SECONDS:
            return "silent"
        if silence > _SILENT_SECONDS:  # the process lives, and no step or batch was done
            state = f"still for {_duration(silence)}"
    return f"{state} ({status['stage']})" if "stage" in status else state


def stages_of(run: Path) -> list[Path]:
    """The runs of which a cascade is made, as far as they have begun; none of another run."""
    names = (
        "dispatcher",
        *sorted((path.name for path in run.glob("expert-*")), key=lambda name: int(name[7:])),
    )
    return [run / name for name in names if (run / name / "config.yaml").exists()]


def _progress(run: Path, status: dict[str, Any]) -> tuple[int | None, int | None]:
    """Steps made, and to make; of a cascade those of all masks, once the router has said how many."""
    stages = stages_of(run)
    if not stages:
        return status.get("step"), status.get("num_steps")
    parts = [_json(stage / "status.json") for stage in stages]
    experts = _planned_steps(run)
    total = parts[0].get("num_steps", 0) + sum(experts) if experts else parts[0].get("num_steps")
    return sum(part.get("step") or 0 for part in parts), total


def _planned_steps(run: Path) -> list[int]:
    """Of each expert, as the cascade's newest plan has it."""
    try:
        lines = (run / "events.jsonl").read_text().splitlines()
        plans = [event for event in map(json.loads, lines) if event["event"] == "experts"]
    except (OSError, ValueError):
        return []
    return [round(steps) for steps in plans[-1]["steps"]] if plans else []


def _newest_checkpoint(run: Path) -> str:
    """Of the run or, for a cascade, of the stage that saved last."""
    for path in (run / "checkpoints", *sorted(run.glob("*/checkpoints"), key=_saved_at, reverse=True)):
        try:
            name = (path / "latest").read_text().strip()
        except (OSError, UnicodeDecodeError):
            continue
        return name if path.parent == run else f"{path.parent.name}/{name}"
    return "-"


def _saved_at(checkpoints: Path) -> float:
    try:
        return (checkpoints / "latest").stat().st_mtime
    except OSError:
        return 0.0


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _duration(seconds: float) -> str:
    """In the unit in which it is two digits or so."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


# ---- commands


def add_commands(commands: Any) -> None:
    """Add `status`, `logs` and `checkpoints` to the command line."""
    status = commands.add_parser("status", help="what runs are doing, from their files")
    status.add_argument("runs", nargs="*", metavar="RUN", help="folders of runs (all in ./runs)")
    status.set_defaults(command=_status)
    logs = commands.add_parser("logs", help="the end of what a process of a run printed")
    logs.add_argument("run", metavar="RUN")
    logs.add_argument("--rank", type=int, default=0, metavar="R", help="which process (0)")
    logs.add_argument("--lines", type=_positive, default=40, metavar="N", help="how many lines (40)")
    logs.set_defaults(command=_logs)
    checkpoints = commands.add_parser("checkpoints", help="list, verify or prune a run's checkpoints")
    checkpoints.add_argument("action", choices=("list", "verify", "prune"))
    checkpoints.add_argument("run", metavar="RUN")
    checkpoints.add_argument(
        "--keep", type=_positive, default=1, metavar="N", help="prune: how many stay (1)"
    )
    checkpoints.set_defaults(command=_checkpoints)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


def _status(options: argparse.Namespace) -> int:
    runs = [Path(run) for run in options.runs] or sorted(
        path.parent for path in Path("runs").glob("*/config.yaml")
    )
    if not runs:
        raise ValueError("there are no runs in ./runs; name their folders")
    rows, complaints = [], []
    for run in runs:
        try:
            rows.append({**read_status(run), "path": str(run)})
            stages = map(read_status, stages_of(run))
            rows += [{**row, "run": f"  {row['run']}", "path": ""} for row in stages]
        except ValueError as error:  # the others are shown all the same
            complaints.append(str(error))
    names = [row["run"] for row in rows if row["path"]]
    for row in rows:
        if row["path"] and names.count(row["run"]) > 1:
            row["run"] = row["path"]
    if rows:
        print(_table([list(_COLUMNS), *([row[name] for name in _COLUMNS] for row in rows)]))
    if complaints:
        raise ValueError("; ".join(complaints))
    return 0


def _logs(options: argparse.Namespace) -> int:
    folder = Path(options.run) / "logs"
    path = folder / f"rank-{options.rank}.log"
    if not path.exists():
        known = sorted(int(found.stem.partition("-")[2]) for found in folder.glob("rank-*.log"))
        there = f"there are ranks {', '.join(map(str, known))}" if known else "there are no logs"
        raise ValueError(f"there is no {path}; {there}")
    with open(path, errors="replace") as stream:
        print("".join(collections.deque(stream, maxlen=options.lines)), end="")
    return 0


def _checkpoints(options: argparse.Namespace) -> int:
    from selfmask_dist.runs import checkpoint  # imports torch

    run = Path(options.run)
    folder = run / "checkpoints"
    if not folder.is_dir():
        stages = sorted(str(path.parent) for path in run.glob("*/checkpoints"))
        hint = f"; those of its stages are in {', '.join(stages)}" if stages else ""
        raise ValueError(f"{run} has no checkpoints{hint}")
    if options.action == "prune":
        if (run / "config.yaml").exists() and read_status(run)["state"] == "running":
            raise ValueError(f"{run} is running and prunes by itself (checkpoint.keep_last)")
        deleted = checkpoint.prune(folder, checkpoint.Retention(last=options.keep))
        print("\n".join(f"deleted {path.name}" for path in deleted) or "nothing to delete")
        return 0
    rows, num_bad = [["checkpoint", "step", "size", "saved"]], 0
    for path in checkpoint.committed(folder):
        try:
            size = sum(file.stat().st_size for file in path.iterdir())
            age = _duration(time.time() - path.stat().st_mtime)
        except FileNotFoundError:  # the run deleted it meanwhile
            continue
        rows.append([path.name, str(checkpoint.step_of(path)), f"{size / 1e6:,.1f} MB", f"{age} ago"])
        if options.action == "verify":
            problems = checkpoint.verify(path)
            num_bad += bool(problems)
            rows[-1].append("; ".join(problems) or "valid")
    print(_table(rows) if len(rows) > 1 else "none is committed yet")
    for path in sorted(folder.glob("invalid-*")):
        print(f"set aside: {path}")
    return 1 if num_bad else 0


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    sides = [">" if name in _RIGHT else "<" for name in rows[0]] + ["<"]
    return "\n".join(
        "  ".join(f"{cell:{sides[i]}{widths[i]}}" for i, cell in enumerate(row)).rstrip() for row in rows
    )
