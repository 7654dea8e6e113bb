"""One supervised run for all tests of whole models."""

from pathlib import Path

import pytest

from tests.models.cases import train, write_hard_data


@pytest.fixture(scope="package")
def hard_data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_hard_data(tmp_path_factory.mktemp("trees"))


@pytest.fixture(scope="package")
def linear_run(hard_data: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with a linear head."""
    return train(tmp_path_factory.mktemp("runs"), hard_data, "linear", "run.licence=cc-by-4.0")
