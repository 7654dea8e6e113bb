"""A copy of the code in the run's folder: what a run started with is what its restarts run.

Knows nothing of training or clusters.
"""

import shutil
from pathlib import Path

from selfmask_dist.common.shipped import CODE, ROOT


def take_snapshot(run: Path) -> dict[str, str]:
    """Copy the packages to `run/code`, anew, and return the environment that makes Python import the copy."""
    code = run / "code"
    partial = run / ".code.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for package in CODE:
        shutil.copytree(
            ROOT / package, partial / package, ignore=shutil.ignore_patterns("__pycache__", "*.pyc")
        )
    shutil.rmtree(code, ignore_errors=True)
    partial.rename(code)
    return snapshot_environment(run)


def snapshot_environment(run: Path) -> dict[str, str]:
    """Return the variables that make Python import from `run/code`, and not from the folder it starts in."""
    return {"PYTHONPATH": str((run / "code").resolve()), "PYTHONSAFEPATH": "1"}
