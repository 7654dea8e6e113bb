"""What runs are doing, from their files alone.

    runs/NAME/status.json (heartbeat)  result.json  checkpoints/  events.jsonl

Works while a run runs and after it, on any machine that sees the folder. Knows nothing of training; the
commands are in `cli.status`.
"""

import json
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selfmask_dist.common import names
from selfmask_dist.common.files import write_text
from selfmask_dist.common.text import age, duration, number
from selfmask_dist.runs.owner import identity
from selfmask_dist.runs.submitted import waiting_job

_SILENT_SECONDS = 60.0
_SLOW, _SLOW_SECONDS = 1.25, 0.01  # a rank's seconds a step: so many times the median, and so much more
COLUMNS = ("run", "state", "step", "loss", "images/s", "restarts", "checkpoint", "heartbeat", "job")


# ---- writing


class Heartbeat:
    """Keeps `status.json`; only the main rank has one.

    Args:
        newest: returns the newest step and its numbers.
        parent: the run that this one is a stage of; its status is then this one's.
        facts: more to state, for example the stage's name.
    """

    def __init__(
        self, run: Path, newest: Callable[[], dict[str, Any]], *, parent: Path | None = None, **facts: Any
    ) -> None:
        self._runs = [run] if parent is None else [run, parent]
        self._newest = newest
        self._lock = threading.Lock()  # the watchdog's thread writes too
        self._facts: dict[str, Any] = {
            "state": "running",
            **identity(),
            **facts,
        }

    def write(self, silence: float = 0.0, **facts: Any) -> None:
        """Write `status.json` with these facts and all earlier ones. A full disk does not stop a run here.

        Args:
            silence: seconds since something moved.
            facts: what is new, for example the run's state.
        """
        with self._lock:
            self._write(silence, facts)

    def _write(self, silence: float, facts: dict[str, Any]) -> None:
        self._facts |= facts
        newest = self._newest()
        numbers = {name: newest.get(name) for name in ("step", "loss", "images_per_second", "ranks")}
        values = {**self._facts, **numbers, "time": time.time(), "silence": round(silence, 1)}
        try:
            for run in self._runs:
                write_text(run / names.STATUS, json.dumps(values) + "\n")
        except OSError as error:
            print(f"status.json could not be written: {error}", file=sys.stderr)


# ---- reading


def read_status(run: Path) -> dict[str, str]:
    """Return one line of the table, every value as text; of a run whose job has not started, that it waits.

    Raises:
        ValueError: the folder is not a run's.
    """
    job = waiting_job(run)
    if job is not None and not (run / names.CONFIG).exists():
        return dict.fromkeys(COLUMNS, "-") | {"run": run.name, "state": "pending", "job": job}
    if not (run / names.CONFIG).exists():
        raise ValueError(f"{run} is not a run: it has no {names.CONFIG}")
    status = _json(run / names.STATUS)
    numbers = {name: value for name, value in status.items() if isinstance(value, int | float)}
    seconds = time.time() - numbers["time"] if "time" in numbers else None
    step, total = _progress(run, status)
    return {
        "run": run.name,
        "state": _state(run, status, seconds, numbers.get("silence", 0.0), is_waiting=job is not None),
        "step": "-" if step is None else f"{step}" + (f"/{total}" if total else ""),
        "loss": f"{numbers['loss']:.4f}" if "loss" in numbers else "-",
        "images/s": f"{numbers['images_per_second']:.0f}" if "images_per_second" in numbers else "-",
        "restarts": str(numbers.get("restarts", "-")),
        "checkpoint": _newest_checkpoint(run),
        "heartbeat": "-" if seconds is None else f"{age(seconds)} ago",
        "job": str(job or status.get("job") or "-"),
    }


def _state(
    run: Path, status: dict[str, Any], seconds: float | None, silence: float, *, is_waiting: bool
) -> str:
    if (run / names.RESULT).exists():
        return "finished"
    if is_waiting:
        return "pending"
    state = str(status.get("state", "no heartbeat"))
    if state == "running":
        if seconds is None or seconds > _SILENT_SECONDS:
            return "silent"
        if silence > _SILENT_SECONDS:  # the process lives, and no step or batch was done
            state = f"still for {age(silence)}"
    return f"{state} ({status['stage']})" if "stage" in status else state


def stragglers(run: Path) -> list[str]:
    """Return a line for each rank that is much slower than the others, and so makes all of them wait.

    Judged by the newest log line: seconds a step of its forward passes, and of waiting for data.
    """
    ranks, lines = _json(run / names.STATUS).get("ranks"), []
    for key, what in (("forward", "its forward passes take"), ("data", "it waits for data for")):
        seconds = ranks.get(key) if isinstance(ranks, dict) else None
        if not isinstance(seconds, list) or len(seconds) < 2 or None in map(number, seconds):
            continue
        median = statistics.median(seconds)
        lines += [
            f"rank {rank} is slow: {what} {duration(value)} a step, {duration(median)} in the middle of all"
            for rank, value in enumerate(seconds)
            if value > _SLOW * median + _SLOW_SECONDS
        ]
    return lines


def memory_of_ranks(run: Path) -> str:
    """Return a sentence on which rank has held most memory by the newest log line; empty where none says."""
    ranks = _json(run / names.STATUS).get("ranks")
    held = ranks.get("memory_mib") if isinstance(ranks, dict) else None
    if not isinstance(held, list) or not held or None in map(number, held):
        return ""
    most = max(range(len(held)), key=held.__getitem__)
    where = f" on rank {most}, {statistics.median(held) / 1024:.2f} in the middle of all {len(held)}"
    return f"most memory held: {held[most] / 1024:.2f} GiB{where if len(held) > 1 else ''}"


def stages_of(run: Path) -> list[Path]:
    """Return the runs of which a cascade is made, as far as they have begun; none for another run."""
    prefix = names.expert("")
    experts = sorted(run.glob(names.expert("*")), key=lambda path: int(path.name.removeprefix(prefix)))
    return [stage for stage in (run / names.DISPATCHER, *experts) if (stage / names.CONFIG).exists()]


def _progress(run: Path, status: dict[str, Any]) -> tuple[int | None, int | None]:
    """Return the steps made, and to make; for a cascade those of all masks, once the router said how many."""
    stages = stages_of(run)
    if not stages:
        return status.get("step"), status.get("num_steps")
    parts = [_json(stage / names.STATUS) for stage in stages]
    experts = _planned_steps(run)
    total = parts[0].get("num_steps", 0) + sum(experts) if experts else parts[0].get("num_steps")
    return sum(part.get("step") or 0 for part in parts), total


def _planned_steps(run: Path) -> list[int]:
    """Return the steps of each expert, as the cascade's newest plan has them."""
    try:
        lines = (run / names.EVENTS).read_text().splitlines()
        plans = [event for event in map(json.loads, lines) if event["event"] == "experts"]
    except (OSError, ValueError):
        return []
    return [round(steps) for steps in plans[-1]["steps"]] if plans else []


def _newest_checkpoint(run: Path) -> str:
    """Return the name of the run's newest checkpoint or, for a cascade, of the stage that saved last."""
    for path in (
        run / names.CHECKPOINTS,
        *sorted(run.glob(f"*/{names.CHECKPOINTS}"), key=_saved_at, reverse=True),
    ):
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
