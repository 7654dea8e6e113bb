"""What a run writes while it trains: `metrics.jsonl`, `events.jsonl`, a progress bar, and wandb where asked
for.

Only the main rank writes; the others call the same methods and nothing happens. Every line is written at
once, so that a killed run has all of them up to its end; what a full disk refuses waits for the next line.
"""

import errno
import json
import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from selfmask_dist.common import names
from selfmask_dist.runs.tracking import Mode, Tracker


class MetricsWriter:
    """Open with `with`; the main rank gets a directory, the others None.

    Args:
        directory: the run's directory.
        progress: show a progress bar where standard error is a terminal, else a line per log.
        wandb_mode: `off`, `offline` or `online`.
        config: the resolved configuration, for wandb.
    """

    def __init__(
        self,
        directory: Path | None,
        *,
        progress: bool = True,
        wandb_mode: Mode = "off",
        wandb_project: str = "selfmask",
        config: dict[str, Any] | None = None,
    ) -> None:
        self.newest: dict[str, Any] = {}  # the last step and its numbers, for the heartbeat
        self._metrics: _Lines | None = None
        self._events: _Lines | None = None
        self._tracker: Tracker | None = None
        self._bar: tqdm[Any] | None = None
        self._progress = progress and directory is not None
        if directory is None:
            return
        self._metrics = _Lines(directory / names.METRICS)
        self._events = _Lines(directory / names.EVENTS)
        self._tracker = Tracker(directory, mode=wandb_mode, project=wandb_project, config=config)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end_progress()
        if error is not None:
            self.event("failed", error=f"{type(error).__name__}: {error}")
        for stream in (self._metrics, self._events):
            if stream is not None:
                stream.close()
        if self._tracker is not None:
            self._tracker.close(failed=error is not None)

    def scalars(self, step: int, values: dict[str, Any]) -> None:
        """Record values at a step: numbers, or {name: number} for per-parameter ones."""
        if self._metrics is None:
            return
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        self.newest = {**self.newest, "step": step, **numbers}
        self._metrics.write({"step": step, "time": time.time(), **values})
        if self._tracker is not None:
            self._tracker.log(step, values)

    def event(self, name: str, **values: Any) -> None:
        """Record something that happened: start, evaluation, warning, failure, end with the result."""
        if self._events is not None:
            self._events.write({"event": name, "time": time.time(), **values})
        if self._tracker is not None and name == "end":
            self._tracker.conclude(values)

    def message(self, text: str) -> None:
        """Print a line for the user, above the progress bar."""
        if self._metrics is not None:
            tqdm.write(text, file=sys.stderr)

    def start_progress(self, total_steps: int, first_step: int = 0) -> None:
        """Show a progress bar where standard error is a terminal."""
        if self._progress and sys.stderr.isatty():
            self._bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True)

    def advance(self, steps: int = 1) -> None:
        """Move the bar on."""
        if self._bar is not None:
            self._bar.update(steps)

    def status(self, text: str) -> None:
        """Show the newest numbers: beside the bar, or as a line of their own where there is no terminal."""
        if self._bar is not None:
            self._bar.set_postfix_str(text)
        elif self._progress:
            print(text, file=sys.stderr, flush=True)

    def end_progress(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class _Lines:
    """Appends JSON lines to a file, from any thread (checkpoints are reported by the one that saves)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        if path.is_file() and not (written := path.read_bytes()).endswith(b"\n"):
            os.truncate(path, written.rfind(b"\n") + 1)  # killed within a line, or the disk was full
        self._stream = open(path, "ab", buffering=0)  # noqa: SIM115
        self._waiting = b""
        self._lock = threading.Lock()

    def write(self, values: dict[str, Any]) -> None:
        with self._lock:
            self._waiting += json.dumps(values).encode() + b"\n"
            self._flush()

    def _flush(self) -> None:
        try:
            while self._waiting:
                self._waiting = self._waiting[self._stream.write(self._waiting) :]
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            print(f"WARNING: {self._path}: {error.strerror}; its lines wait for space", file=sys.stderr)

    def close(self) -> None:
        """Close the file. What the disk does not take now is lost; a restarted run writes it again."""
        with self._lock:
            self._flush()
            self._stream.close()
