"""One row of the comparison of methods: what it is, and how it is measured in a setting.

Most rows are a configuration of `configs/methods/` run as users run it; a procedure brings its own function.
Knows nothing of other rows.
"""

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selfmask_dist.cli.train import run
from selfmask_dist.config import load_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "methods"


def config_path(name: str) -> Path:
    """The file `name`.yaml in one of the folders of `configs/methods/`."""
    return next(CONFIGS.glob(f"*/{name}.yaml"))


@dataclass(frozen=True)
class Setting:
    """The data, the backbone and the budget that all rows share, as overrides of a configuration.

    name: of the data, by which `rates.json` has the row's learning rates.
    captioned: over `overrides`, for rows that learn from captions: the same pictures with a sentence each,
        and a backbone with a text tower.
    rates: over a row's own overrides, its learning rates here.
    brief: over all of these, what ends a training after a few steps, to time them.
    """

    overrides: tuple[str, ...]
    folder: Path
    seed: int
    batch_size: int
    name: str = ""
    captioned: tuple[str, ...] = ()
    rates: tuple[str, ...] = ()
    brief: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What one row gave with one seed; None where a row has no such number.

    knn20, probe, head: test accuracies, 0 to 1; head is the method's own classifier.
    active: share of the backbone's weights that are not zero. stored_bytes: what is kept for the task beside
    the backbone that all tasks share, without the head. step_seconds: computing a step, without waiting for
    data.
    """

    knn20: float | None
    probe: float | None
    head: float | None
    active: float | None
    stored_bytes: int | None
    step_seconds: float | None
    more: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """A method: its group in `docs/methods.md`, its source, and how one seed of it is measured.

    configs: the files of `configs/methods/` that it runs, without `.yaml`.
    """

    name: str
    group: str
    source: str
    measure: Callable[[Setting], Outcome]
    configs: tuple[str, ...] = ()


def config_row(
    name: str,
    group: str,
    source: str,
    *own: str,
    config: str | None = None,
    measures: Callable[[Path], dict[str, Any]] | None = None,
) -> Row:
    """A row that is one configuration, trained in the setting.

    Args:
        own: overrides of this row, what fits it to the small settings or makes it a variant.
        config: a file of `configs/methods/`; None: the one of the row's name.
        measures: further numbers, from the run's folder.
    """
    config = config or name

    def measure(setting: Setting) -> Outcome:
        result, folder = train(setting, name, config_path(config), own)
        outcome = outcome_of(result, folder, setting)
        if measures is not None:
            outcome.more.update(measures(folder))
        return outcome

    return Row(name, group, source, measure, (config,))


def train(
    setting: Setting, name: str, config: Path | None, own: Sequence[str] = ()
) -> tuple[dict[str, Any], Path]:
    """Run a configuration in the setting; returns what its `result.json` holds, and its folder."""
    place = [f"run.dir={setting.folder}", f"run.name={name}-{setting.seed}", f"seed={setting.seed}"]
    overrides = [*setting.overrides, *own, *setting.rates, *setting.brief, *place]
    result = run(load_config(config, overrides))
    return result, setting.folder / f"{name}-{setting.seed}"


def outcome_of(result: dict[str, Any], folder: Path, setting: Setting) -> Outcome:
    """The numbers of a finished run."""
    measured = result.get("adapted") or result.get("frozen") or {}
    mask = result.get("mask") or {}
    stored = mask.get("bytes", result.get("stored_bytes"))
    return Outcome(
        knn20=measured.get("knn20"),
        probe=measured.get("probe"),
        head=measured.get("head"),
        active=mask.get("active", 1.0),
        stored_bytes=stored,
        step_seconds=step_seconds(folder, setting.batch_size),
    )


def step_seconds(run_folder: Path, batch_size: int) -> float | None:
    """The median of a run's logged step times, without waiting for data."""
    path = run_folder / "metrics.jsonl"
    if not path.is_file():
        return None
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    times = [
        batch_size * (1 - line["data_wait"]) / line["images_per_second"]
        for line in lines
        if line.get("images_per_second")
    ]
    return statistics.median(times) if times else None
