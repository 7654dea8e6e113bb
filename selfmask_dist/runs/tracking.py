"""A run as Weights & Biases sees it: numbers by step, the result as summary, the mask as artifact.

Stages of a cascade or a procedure are runs of one group. Where the server cannot be reached the run is logged
into its folder, with a line that says how to upload it. Knows nothing of training but the names of its files.
"""

import os
import sys
import threading
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from selfmask_dist.common import names
from selfmask_dist.common.optional import require

Mode = Literal["off", "offline", "online"]

_SERVER = "https://api.wandb.ai"
_PROBE_SECONDS = 4.0  # for a server to answer at all
_INIT_SECONDS = 60.0  # for a server that answers to begin a run
_BY_PARAMETER = "mask/active_by_parameter"
_CHART = "mask/pruned_by_layer"


class Tracker:
    """Logs one run; nothing in the mode `off`.

    Args:
        directory: the run's folder; its id in wandb is kept there, so that a restart goes on with it.
        config: the resolved configuration.
    """

    def __init__(self, directory: Path, *, mode: Mode, project: str, config: dict[str, Any] | None) -> None:
        self._directory = directory
        self._run: Any = None
        self._active: dict[str, float] = {}  # the share kept of each parameter, as logged last
        if mode == "off":
            return
        self._wandb: Any = require("wandb", "wandb", needed_by=f"run.wandb={mode}")
        options = {
            "project": project,
            "dir": str(directory),
            "config": config,
            "id": _wandb_id(directory),
            "resume": "allow",  # a restart goes on with the run of that id
            "allow_val_change": True,  # of run.resume and what else may differ then
            "tags": _tags(config or {}),
            **_place(directory, config or {}),
        }
        reason = why_unreachable() if mode == "online" else ""
        if mode == "online" and not reason:
            try:
                settings = self._wandb.Settings(init_timeout=_INIT_SECONDS)
                self._run = self._wandb.init(mode="online", settings=settings, **options)
                return
            except self._wandb.Error as error:
                reason = " ".join(str(error).split())
        self._run = self._wandb.init(mode="offline", **options)
        if mode == "online":
            folder = Path(self._run.dir).parent
            print(f"wandb: offline, as {reason}; upload later with `wandb sync {folder}`", file=sys.stderr)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Log the numbers of a step; what is there for each parameter becomes one chart at the end."""
        if self._run is None:
            return
        if isinstance(shares := values.get(_BY_PARAMETER), Mapping):
            self._active = dict(shares)
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        if isinstance(empty := values.get("mask/empty"), list):
            numbers["mask/empty"] = len(empty)
        self._run.log(numbers, step=step)

    def conclude(self, result: Mapping[str, Any]) -> None:
        """Log the run's result: every number as `final/...` in the summary, a cascade's views as a table and
        its picture, and the mask file as an artifact.
        """
        if self._run is None:
            return
        for name, value in _numbers(result, "final"):
            self._run.summary[name] = value
        if isinstance(verdict := result.get("verdict"), list):
            self._run.summary["final/verdict"] = ", ".join(entry["name"] for entry in verdict) or "none"
        if decision := (result.get("retrieval") or {}).get("decision"):
            self._run.summary["final/decision"] = decision
        if isinstance(views := result.get("views"), Mapping):
            measures = list(dict.fromkeys(name for row in views.values() for name in row))
            rows = [[view, *(row.get(name) for name in measures)] for view, row in views.items()]
            self._run.log({"final/views": self._wandb.Table(columns=["view", *measures], data=rows)})
        if (picture := self._directory / names.CASCADE_PICTURE).exists():
            self._run.log({"final/picture": self._wandb.Image(str(picture))})
        for name in (names.MASK, names.CASCADE_MASK):
            if (path := self._directory / name).exists():
                metadata = dict(_numbers(result, "final"))
                artifact = self._wandb.Artifact(f"mask-{self._run.id}", type="mask", metadata=metadata)
                artifact.add_file(str(path))
                self._run.log_artifact(artifact)

    def close(self, *, failed: bool) -> None:
        """End the run, with the chart of what each layer prunes."""
        if self._run is None:
            return
        if self._active:
            rows = [[name, 1 - share] for name, share in self._active.items()]
            table = self._wandb.Table(columns=["layer", "pruned"], data=rows)
            chart = self._wandb.plot.bar(table, "layer", "pruned", title="Share of weights pruned, by layer")
            self._run.log({_CHART: chart})
        self._run.finish(exit_code=int(failed))


def why_unreachable() -> str:
    """Return why wandb's server does not answer; nothing where it does. It takes a few seconds at most."""
    url = os.environ.get("WANDB_BASE_URL", _SERVER)
    found = [f"{url} did not answer in {_PROBE_SECONDS:g} s"]

    def ask() -> None:
        try:
            with urllib.request.urlopen(url, timeout=_PROBE_SECONDS):  # heeds proxies
                found[0] = ""
        except urllib.error.HTTPError:  # an answer
            found[0] = ""
        except (OSError, ValueError) as error:
            found[0] = f"{url} cannot be reached ({getattr(error, 'reason', error)})"

    # looking a name up has no time limit of its own
    thread = threading.Thread(target=ask, name="wandb probe", daemon=True)
    thread.start()
    thread.join(1.5 * _PROBE_SECONDS)
    return found[0]


def _place(directory: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's name and group: a stage lies in the folder of the run that it is a part of."""
    whole = directory.absolute().parent
    if (whole / names.CONFIG).exists():
        return {"name": f"{whole.name}/{directory.name}", "group": whole.name, "job_type": directory.name}
    method = str(config.get("method", "run"))
    return {"name": directory.name, "group": directory.name, "job_type": method}


def _tags(config: Mapping[str, Any]) -> list[str]:
    """Return what one looks for runs by: method, objective, backbone, family of masks."""
    method = config.get("method")
    keys = (
        ("objective", "name"),
        ("backbone", "name"),
        *([("mask", "family")] if method != "finetune" else []),
    )
    sections = ((config.get(section), key) for section, key in keys)
    found = [method, *(section.get(key) for section, key in sections if isinstance(section, Mapping))]
    return [str(tag)[:64] for tag in dict.fromkeys(found) if tag]  # wandb refuses longer ones


def _numbers(values: Mapping[str, Any], path: str) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{path}/{name}")
        elif isinstance(value, int | float):
            yield f"{path}/{name}", value


def _wandb_id(directory: Path) -> str:
    """Return the id of the run's folder in wandb: made at its first start, kept there for the next ones."""
    path = directory / "wandb" / "id"
    known = path.read_text().strip() if path.exists() else ""
    if known:
        return known
    new = uuid.uuid4().hex[:12]
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"{new}\n")
    return new
