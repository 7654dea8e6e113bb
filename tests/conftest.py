"""What every test shares: markers that skip with a reason, seeds, the shared data, no network."""

import os

# before torch is imported: one thread for each process, since tests run side by side
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"

import random
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reasons = {}
    if not torch.cuda.is_available():
        reasons["gpu"] = "no CUDA device"
    if shutil.which("sbatch") is None:
        reasons["slurm"] = "no SLURM here: sbatch is not on PATH"
    if not config.getoption("--slow"):
        reasons["slow"] = "slow: give --slow to run it"
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def _seed_of(item: pytest.Item) -> int:
    """A test's seed: of its name alone, so that neither the order of tests nor their number matters."""
    return zlib.crc32(item.nodeid.encode())


@pytest.fixture(autouse=True)
def _seed_everything(request: pytest.FixtureRequest) -> None:
    """Seeds the global generators, for what draws from them unasked (a module's initial weights)."""
    seed = _seed_of(request.node)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (the global state is the one to seed)
    torch.manual_seed(seed)


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """A generator of the test's own: `torch.randn(3, generator=generator)`."""
    return torch.Generator().manual_seed(_seed_of(request.node))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real images and pretrained weights: SELFMASK_SHARED_DATA, or shared/data beside the repository."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    path = Path(os.environ.get("SELFMASK_SHARED_DATA", beside))
    if not path.is_dir():
        pytest.skip(f"no shared data at {path}; set SELFMASK_SHARED_DATA to its folder")
    return path
