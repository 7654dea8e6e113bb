"""What every test shares: markers that skip with a reason, seeds, the shared data, no network.

Torch is imported inside the functions: the controlling process of pytest-xdist loads this file too, and runs
no test.
"""

import fcntl
import os
import random
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.bytecode import keep_bytecode

if TYPE_CHECKING:
    import torch

# before torch is imported: one thread for each process, since tests run side by side
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"
if keep_bytecode(os.environ):
    sys.dont_write_bytecode, sys.pycache_prefix = False, os.environ["PYTHONPYCACHEPREFIX"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption("--minutes", type=float, help="start no test later than so many minutes after the first")
    parser.addoption("--begin-at", type=int, default=0, help="a number: begin with another test for each")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    import torch

    reasons = {}
    if not torch.cuda.is_available():
        reasons["gpu"] = "no CUDA device"
    if shutil.which("sbatch") is None:
        reasons["slurm"] = "no SLURM here: sbatch is not on PATH"
    if not config.getoption("--slow"):
        reasons["slow"] = "slow: `make test-all` or --slow runs it"
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
    if items and (first := 7 * config.getoption("--begin-at") % len(items)):
        items[:] = items[first:] + items[:first]


_first_start: list[float] = []


def pytest_runtest_setup(item: pytest.Item) -> None:
    minutes = item.config.getoption("--minutes")
    if minutes is None:
        return
    _first_start[:] = _first_start or [time.monotonic()]
    if time.monotonic() - _first_start[0] > 60 * minutes:
        pytest.skip(f"no time left of --minutes={minutes:g}")


def _seed_of(item: pytest.Item) -> int:
    """Return a test's seed, which depends on the names of its file and itself alone.

    Neither the order and the number of tests nor the folder of the file matter.
    """
    return zlib.crc32(f"tests/{item.path.name}::{item.nodeid.partition('::')[2]}".encode())


@pytest.fixture(autouse=True)
def _seed_everything(request: pytest.FixtureRequest) -> None:
    """Seed the global generators, for what draws from them unasked (a module's initial weights)."""
    import numpy as np
    import torch

    seed = _seed_of(request.node)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (the global state is the one to seed)
    torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def _one_at_a_time_on_slurm(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let one test at a time use the cluster: they preempt each other's jobs and take nodes away."""
    if request.node.get_closest_marker("slurm") is None:
        yield
        return
    with open(Path(tempfile.gettempdir()) / "selfmask-slurm-tests.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> "torch.Generator":
    """Return a generator of the test's own: `torch.randn(3, generator=generator)`."""
    import torch

    return torch.Generator().manual_seed(_seed_of(request.node))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real images and pretrained weights.

    It is SELFMASK_SHARED_DATA, or shared/data beside the repository; without either the test is skipped.
    """
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    path = Path(os.environ.get("SELFMASK_SHARED_DATA", beside))
    if not path.is_dir():
        pytest.skip(f"no shared data at {path}; set SELFMASK_SHARED_DATA to its folder")
    return path
