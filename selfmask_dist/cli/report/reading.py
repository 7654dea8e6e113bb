"""A run's folder as it is: finished, running, failed at once, a cascade, or with files that are damaged.

What cannot be read is left out and named in `problems`; only a folder that is no run is an error.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from selfmask_dist.common import names
from selfmask_dist.common.text import number
from selfmask_dist.config import yaml as config_yaml
from selfmask_dist.maskfile.tools.comparison import ComparedMask, labels_of, read_subjects
from selfmask_dist.runs import status

STAGES = (names.DISPATCHER, "expert-*")


@dataclass(frozen=True)
class SavedStep:
    """A committed checkpoint by its folder's name, and what it takes on the disk."""

    name: str
    num_bytes: int


@dataclass
class Run:
    """What a run's folder holds, as far as it could be read."""

    path: Path
    label: str
    colour: int = 0  # its place among the curves
    config_text: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    status: dict[str, str] = field(default_factory=dict)
    heartbeat: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    frozen: dict[str, Any] = field(default_factory=dict)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    checkpoints: list[SavedStep] = field(default_factory=list)
    subjects: list[ComparedMask] = field(default_factory=list)
    clusters: list[int] = field(default_factory=list)  # training images of each, of a cascade
    stages: list["Run"] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def setting(self, section: str, key: str) -> Any:
        """Return a value of the run's configuration; None where a damaged file does not have it."""
        values = self.config.get(section)
        return values.get(key) if isinstance(values, Mapping) else None

    @property
    def method(self) -> str:
        """What the run trains, as `method` of its configuration says."""
        return str(self.config.get("method") or "?")

    @property
    def state(self) -> str:
        """Whether it runs, has finished, or stopped, as `selfmask status` says."""
        return self.status["state"]

    @property
    def views(self) -> dict[str, dict[str, float]]:
        """Every measurement, {view: {measure: value}}, the frozen backbone first."""
        if isinstance(self.result.get("views"), Mapping):
            found = dict(self.result["views"])
        else:
            found = {
                "frozen": self.result.get("frozen") or self.frozen,
                self.own_view: self.result.get("adapted"),
            }
        return {
            str(view): {str(name): float(value) for name, value in row.items() if number(value) is not None}
            for view, row in found.items()
            if isinstance(row, Mapping) and row
        }

    @property
    def own_view(self) -> str:
        """What this run's own embeddings are called."""
        if self.method == "finetune":
            return "fine-tuned"
        return "masked" if self.setting("objective", "name") == "supervised" else "self-masked"

    @property
    def error(self) -> str | None:
        """Why it failed, unless it went on later."""
        for event in reversed(self.events):
            if event.get("event") == "failed":
                return str(event.get("error", "no reason stated"))
            if event.get("event") in ("start", "resume", "end"):
                return None
        return None

    def series(self, name: str) -> list[tuple[float, float]]:
        """Return (step, value) of a metric in the order of steps, without values that are not finite."""
        points = {
            line["step"]: float(line[name]) for line in self.metrics if number(line.get(name)) is not None
        }
        return sorted(points.items())

    def active_by_parameter(self) -> dict[str, float]:
        """Return the share of weights kept, by parameter, as it was logged last."""
        for line in reversed(self.metrics):
            found = line.get("mask/active_by_parameter")
            if isinstance(found, Mapping):
                return {str(k): float(v) for k, v in found.items() if number(v) is not None}
        return {}

    def with_stages(self) -> list["Run"]:
        """Return the runs that trained: a cascade's stages, or the run itself."""
        return self.stages or [self]

    def every_problem(self) -> list[str]:
        """Return what could not be read of the run and its stages."""
        return [*self.problems, *(problem for stage in self.stages for problem in stage.every_problem())]


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read runs' folders.

    Raises:
        ValueError: a folder is not a run's.
    """
    runs = [read_run(path, label) for path, label in zip(paths, labels_of(list(paths)), strict=True)]
    for colour, one in enumerate(stage for run in runs for stage in run.with_stages()):
        one.colour = colour
    for run in runs:
        run.colour = run.with_stages()[0].colour
    return runs


def read_run(path: Path, label: str) -> Run:
    """Read one run's folder; it raises what `read_runs` raises."""
    run = Run(path, label, status=status.read_status(path))
    if not (path / names.CONFIG).exists():
        raise ValueError(f"{path} has not begun: SLURM job {run.status['job']} is pending")
    read = _Reader(run)
    run.config_text = read.text(names.CONFIG)
    parsed = config_yaml.parse(run.config_text)
    run.config = parsed.value if isinstance(parsed.value, dict) else {}
    if parsed.problems or not run.config:
        run.problems.append(f"{path / names.CONFIG} is damaged: the settings below are as the file has them")
    run.environment = read.json(names.ENVIRONMENT)
    run.result = read.json(names.RESULT)
    run.frozen = read.json(names.FROZEN)
    run.heartbeat = read.json(names.STATUS)
    run.metrics = read.lines(names.METRICS, lambda line: type(line.get("step")) is int)
    run.events = read.lines(names.EVENTS, lambda line: isinstance(line.get("event"), str))
    for evaluation in sorted(path.glob(f"{names.EVAL}/*.json")):
        found = read.json(f"{names.EVAL}/{evaluation.name}")
        if isinstance(found.get("rows"), list) and isinstance(found.get("columns"), list):
            run.evaluations.append(found)
    run.checkpoints = [
        SavedStep(folder.name, sum(file.stat().st_size for file in folder.iterdir() if file.is_file()))
        for folder in sorted((path / names.CHECKPOINTS).glob("step-*"))
        if folder.is_dir()
    ]
    run.subjects = _read_masks(run)
    folders = [folder for pattern in STAGES for folder in sorted(path.glob(pattern), key=_by_number)]
    run.stages = [
        read_run(folder, f"{label}: {folder.name}") for folder in folders if (folder / names.CONFIG).exists()
    ]
    for stage in run.stages:  # which do not measure the frozen backbone themselves
        stage.frozen = stage.frozen or dict(run.views.get("frozen", {}))
    sizes = read.json(f"{names.ROUTER}/{names.CLUSTER_SIZES}", list)
    run.clusters = [size for size in sizes if type(size) is int] if isinstance(sizes, list) else []
    return run


def _by_number(path: Path) -> tuple[int, str]:
    return len(path.name), path.name


def _read_masks(run: Run) -> list[ComparedMask]:
    if not any((run.path / name).exists() for name in (names.MASK, names.CASCADE_MASK)):
        return []
    try:
        return [_labelled(subject, run.label) for subject in read_subjects([run.path])]
    except (OSError, ValueError) as error:
        run.problems.append(str(error))
        return []


def _labelled(subject: ComparedMask, label: str) -> ComparedMask:
    name = f"{label}: {subject.role}" if subject.role else label
    return replace(subject, label=name, cascade=label if subject.cascade else None)


class _Reader:
    """Reads files of a run; what fails is noted there."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def text(self, name: str) -> str:
        """Return a file's text; nothing where there is no such file, or it cannot be read."""
        try:
            return (self._run.path / name).read_text(errors="replace")
        except FileNotFoundError:
            return ""
        except OSError as error:
            self._run.problems.append(f"{self._run.path / name} cannot be read: {error.strerror}")
            return ""

    def json(self, name: str, kind: type = dict) -> Any:
        """Return the value of a JSON file, which is of type `kind`; an empty one where it is not."""
        text = self.text(name)
        if not text:
            return kind()
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, kind):
            return value
        self._run.problems.append(f"{self._run.path / name} is damaged: left out")
        return kind()

    def lines(self, name: str, is_valid: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
        """Return the JSON objects of a file with one a line; what is damaged is noted and left out.

        The last line may be half written, in a run that is going on or was killed: that is no damage.
        """
        text = self.text(name)
        found, damaged = [], []
        lines = text.split("\n")
        for i, line in enumerate(lines, start=1):
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                value = None
            if isinstance(value, dict) and is_valid(value):
                found.append(value)
            elif line and i < len(lines):
                damaged.append(i)
        if damaged:
            places = ", ".join(map(str, damaged[:5])) + (", ..." if len(damaged) > 5 else "")
            word = "line is" if len(damaged) == 1 else "lines are"
            self._run.problems.append(
                f"{self._run.path / name}: {len(damaged)} {word} damaged and left out ({places})"
            )
        return found


def seconds_of(run: Run) -> float | None:
    """Return the time from the first sign of life to the last, pauses between restarts included; None where
    there is no sign.
    """
    times = [number(line.get("time")) for line in (*run.events, *run.metrics)]
    if run.state in ("running", "silent"):
        times.append(number(run.heartbeat.get("time")))
    known = [time for time in times if time is not None]
    return max(known) - min(known) if known else None


def median_of(points: Sequence[tuple[float, float]]) -> float:
    """Return the upper median of the values of (step, value) points; NaN where there are none."""
    values = sorted(value for _, value in points)
    return values[len(values) // 2] if values else math.nan
