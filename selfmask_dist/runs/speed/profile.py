"""What some steps of a run spend their time on: torch's profiler, written beside the run (`run.profile`).

    runs/NAME/profile/rank-0.json.gz    a trace for chrome://tracing or Perfetto, with named parts
    runs/NAME/profile/rank-0.txt        operations by the time that they took

The trainer names its parts with `part`; the names are in traces of other profilers as well (NVTX ranges under
`torch.autograd.profiler.emit_nvtx`). Knows neither objectives nor engines.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

_ROWS = 60  # of the table


def part(name: str) -> AbstractContextManager[object]:
    """Return a context that traces show under this name; next to nothing where nobody profiles."""
    return record_function(f"selfmask: {name}")


class StepProfiler:
    """Profiles the steps first, ..., last - 1 of this process, and writes what it found after the last.

    Args:
        report: told where the trace lies.
    """

    def __init__(
        self, folder: Path, rank: int, steps: tuple[int, int], *, report: Callable[[str], None]
    ) -> None:
        self._folder, self._rank, self._report = folder, rank, report
        self._first, self._end = steps
        self._profile: profile | None = None

    def before_step(self, step: int) -> None:
        """Begin where `step` is the first one."""
        if step == self._first:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities, record_shapes=True, profile_memory=True)
            self._profile.start()

    def after_step(self, step: int) -> None:
        """End and write where `step` was the last one, or the run's."""
        if self._profile is not None and step + 1 >= self._end:
            self.close()

    def close(self) -> None:
        """Write what there is so far; nothing where no step was profiled or all was written."""
        found, self._profile = self._profile, None
        if found is None:
            return
        found.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        trace = self._folder / f"rank-{self._rank}.json.gz"
        found.export_chrome_trace(str(trace))
        order = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = found.key_averages().table(sort_by=order, row_limit=_ROWS, max_name_column_width=60)
        trace.with_name(f"rank-{self._rank}.txt").write_text(table + "\n")
        self._report(f"profile of the steps {self._first} to {self._end - 1}: {trace} (open it in Perfetto)")
