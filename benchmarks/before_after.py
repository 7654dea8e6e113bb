"""Whether a change of the code changed any speed: benchmarks at two commits, one after the other, in one run.

    python -m benchmarks.before_after REVISION [--benchmarks step_time knn ...] [--json]

Each benchmark runs with `--quick` at REVISION (in a git worktree of its own) and here, `--rounds` times in
turn. The figures are medians over the rounds, as `here / before`; a benchmark whose figures are exact (bytes,
mismatches) must give 1. What moved between the two commits is found by the benchmark's result name.
"""

import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.harness import Benchmark

ROOT = Path(__file__).resolve().parents[1]
DEFAULT = ("step_time", "engine_bytes", "data_throughput", "knn", "mask_size")


def main() -> int:
    bench = Benchmark("before_after", __doc__)
    bench.parser.add_argument("revision", help="the commit to compare with")
    bench.parser.add_argument("--rounds", type=int, default=1, metavar="N", help="runs at each commit (1)")
    bench.parser.add_argument(
        "--benchmarks", nargs="+", default=DEFAULT, metavar="NAME", help=f"result names ({' '.join(DEFAULT)})"
    )
    args = bench.parse()
    with _worktree(args.revision) as before:
        bench.figure("before", _git("rev-parse", args.revision))
        bench.figure("here", _git("rev-parse", "HEAD"))
        for name in args.benchmarks:
            found: dict[str, list[dict[str, float]]] = {"before": [], "here": []}
            for _ in range(args.rounds):
                found["before"].append(_run(before, name))
                found["here"].append(_run(ROOT, name))
            for figure, ratio in _ratios(found["before"], found["here"]).items():
                bench.figure(f"{name}: {figure}", ratio)
    return bench.finish()


@contextmanager
def _worktree(revision: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "before"
        _git("worktree", "add", "--detach", str(path), revision)
        try:
            yield path
        finally:
            _git("worktree", "remove", "--force", str(path))


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _script(root: Path, name: str) -> Path:
    """The script whose result is called `name`."""
    for path in sorted((root / "benchmarks").rglob("*.py")):
        # harness.py shows the call in its docstring
        if path.name != "harness.py" and re.search(rf'Benchmark\("{name}"', path.read_text()):
            return path
    raise ValueError(f"no benchmark under {root} has a result called {name}")


def _run(root: Path, name: str) -> dict[str, float]:
    """The numbers among the figures of one quick run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(_script(root, name)), "--quick", "--json", f"--out={folder}/out.json"]
        # the code of that commit, wherever this environment's own installation points
        environment = {**os.environ, "PYTHONPATH": str(root)}
        done = subprocess.run(
            command, cwd=root, env=environment, check=True, stdout=subprocess.PIPE, text=True
        )
    return _numbers(json.loads(done.stdout.splitlines()[-1])["figures"])


def _numbers(value: Any, prefix: str = "") -> dict[str, float]:
    if isinstance(value, dict):
        parts = [_numbers(item, f"{prefix}{'.' if prefix else ''}{key}") for key, item in value.items()]
        return {key: number for part in parts for key, number in part.items()}
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return {prefix: float(value)} if is_number else {}


def _ratios(before: list[dict[str, float]], here: list[dict[str, float]]) -> dict[str, float]:
    """here / before of the medians, for the figures that both have and that are not 0 before."""
    names = [name for name in before[0] if all(name in run for run in (*before, *here))]
    old = {name: statistics.median(run[name] for run in before) for name in names}
    new = {name: statistics.median(run[name] for run in here) for name in names}
    return {name: new[name] / old[name] for name in names if old[name]}


if __name__ == "__main__":
    sys.exit(main())
