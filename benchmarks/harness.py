"""The shape that all benchmarks share: arguments, figures with promised bounds, one JSON line.

    benchmark = Benchmark("step_time", __doc__)
    args = benchmark.parse()
    benchmark.figure("masked / full", 1.02, max=1.03)
    return benchmark.finish()

`pass` is true only where every target holds: a target whose figure was not measured, or is NaN, is missed. A
missed target is reported and does not fail the command; `--strict` makes it fail. Knows nothing of what is
measured.
"""

import argparse
import contextlib
import gc
import json
import math
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "open_clip_torch",
    "deepspeed",
    "webdataset",
    "numpy",
    "selfmask_dist",
)
GIB = 2**30


class Benchmark:
    """One benchmark: add arguments to `parser`, `parse`, record figures, `finish`."""

    def __init__(self, name: str, description: str | None) -> None:
        self.name = name
        self.parser = argparse.ArgumentParser(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        self.parser.add_argument(
            "--quick", action="store_true", help="a smaller size, within a minute on two cores"
        )
        self.parser.add_argument(
            "--json", action="store_true", help="print the result as one JSON line, the last of stdout"
        )
        self.parser.add_argument(
            "--out", type=Path, help=f"where the result goes (default: benchmarks/results/{name}.json)"
        )
        self.parser.add_argument("--strict", action="store_true", help="exit with 1 where a target is missed")
        self.args = argparse.Namespace()
        self._figures: dict[str, Any] = {}
        self._targets: dict[str, dict[str, float]] = {}
        self._skipped: str | None = None
        self._start = time.perf_counter()

    def parse(self, argv: list[str] | None = None) -> argparse.Namespace:
        """Read the command line."""
        self.args = self.parser.parse_args(argv)
        return self.args

    def figure(
        self, name: str, value: Any, *, max: float | None = None, min: float | None = None, quick: bool = True
    ) -> None:
        """Record a number (or anything JSON can hold), and the bounds it is promised to keep.

        Args:
            quick: False where the bound means nothing at the size of `--quick`; it is then left out there.
        """
        assert name not in self._figures, name
        self._figures[name] = _plain(value)
        self.target(name, max=max, min=min, quick=quick)

    def target(
        self, name: str, *, max: float | None = None, min: float | None = None, quick: bool = True
    ) -> None:
        """Promise a bound for a figure, which may be recorded later."""
        bounds = {side: bound for side, bound in (("max", max), ("min", min)) if bound is not None}
        if bounds and (quick or not self.args.quick):
            self._targets[name] = bounds

    def skip(self, reason: str) -> None:
        """Note why this benchmark cannot run here. Its result then passes nothing."""
        self._skipped = reason

    def holds(self, name: str) -> bool:
        """Whether a target is kept."""
        value = self._figures.get(name)
        if not isinstance(value, int | float):  # not measured, or not finite
            return False
        bounds = self._targets[name]
        return bounds.get("min", -math.inf) <= value <= bounds.get("max", math.inf)

    @staticmethod
    def median(values: Iterable[float]) -> float:
        """Of times and ratios: one slow round does not move it."""
        return statistics.median(values)

    def result(self) -> dict[str, Any]:
        """Everything about this run, ready for JSON."""
        return {
            "name": self.name,
            "quick": self.args.quick,
            "skipped": self._skipped,
            "seconds": round(time.perf_counter() - self._start, 2),
            "hardware": hardware(),
            "versions": versions(),
            "figures": self._figures,
            "targets": self._targets,
            "pass": self._skipped is None and all(self.holds(name) for name in self._targets),
        }

    def finish(self) -> int:
        """Print and write the result; returns the exit code."""
        result = self.result()
        print(self._table(result), file=sys.stderr, flush=True)
        default = RESULTS / f"{self.name}{'.quick' if self.args.quick else ''}.json"
        if self._skipped is None or self.args.out:  # a skipped run does not overwrite a real result
            path: Path = self.args.out or default
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
        if self.args.json:
            print(json.dumps(result, allow_nan=False), flush=True)
        return int(self.args.strict and not result["pass"])

    def _table(self, result: Mapping[str, Any]) -> str:
        lines = [f"{self.name}{' (quick)' if self.args.quick else ''}, {result['seconds']} s"]
        if self._skipped is not None:
            return "\n".join([*lines, f"  skipped: {self._skipped}"])
        width = max(map(len, [*self._figures, *self._targets]), default=0)
        for name in dict.fromkeys([*self._figures, *self._targets]):
            value = self._figures.get(name, "not measured")
            line = f"  {name:<{width}}  {f'{value:.5g}' if isinstance(value, float) else value}"
            if name in self._targets:
                bounds = ", ".join(f"{side} {bound:g}" for side, bound in self._targets[name].items())
                line += f"   [{bounds}: {'holds' if self.holds(name) else 'MISSED'}]"
            lines.append(line)
        return "\n".join([*lines, f"  pass: {result['pass']}"])


def _plain(value: Any) -> Any:
    """What JSON can hold: numbers of numpy and torch become plain ones, NaN and infinity become null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def hardware() -> dict[str, Any]:
    """CPU model, cores that this process may use, memory in GiB, and GPU names."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _cpu_model(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu_model() -> str:
    if sys.platform == "darwin":
        return subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=True
        ).stdout.strip()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that figures depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def interleave(
    fns: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each call, in turns A B C A B C ..., so that a slow minute meets all of them alike.

    Args:
        clock: `time.thread_time` for work of one thread on a processor that others use as well.
    """
    import torch

    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    seconds: dict[str, list[float]] = {name: [] for name in fns}
    was_enabled = gc.isenabled()
    try:
        for turn in range(warmup + rounds):
            gc.collect()
            gc.disable()  # a collection would land on whoever happens to be running
            for name, fn in fns.items():
                synchronize()
                start = clock()
                fn()
                synchronize()
                if turn >= warmup:
                    seconds[name].append(clock() - start)
    finally:
        if was_enabled:
            gc.enable()
    return seconds


def ratio_to_first(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """Median over rounds of each one's time divided by the first one's time in the same round."""
    first = next(iter(seconds.values()))
    return {
        name: statistics.median(mine / base for mine, base in zip(times, first, strict=True))
        for name, times in seconds.items()
    }


def peak_memory(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Bytes that `fn(...)` needs at its highest point, seen in a fresh process of its own.

    Args:
        fn: a function at the top level of a module. What its imports took is not counted.

    Returns:
        The GPU's allocated memory if `fn` used one, else the growth of the resident memory.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_measure_peak, args=(theirs, fn, args, kwargs))
    process.start()
    theirs.close()
    try:
        return int(ours.recv())
    except EOFError:
        process.join()
        raise RuntimeError(
            f"{fn.__name__} ended with exit code {process.exitcode}; see its traceback above"
        ) from None
    finally:
        process.join()


def _measure_peak(
    connection: Connection, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    # 5 sets the high-water mark back to the present size: a peak during imports is not the benchmark's
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before = _high_water()
    fn(*args, **kwargs)
    torch = sys.modules.get("torch")
    used_gpu = torch is not None and torch.cuda.is_initialized()
    connection.send(torch.cuda.max_memory_allocated() if torch and used_gpu else _high_water() - before)


def _high_water() -> int:
    """Largest resident size so far, in bytes."""
    with contextlib.suppress(OSError), open("/proc/self/status") as lines:
        # not ru_maxrss: on Linux it starts at the size of the process that started this one
        for line in lines:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024
