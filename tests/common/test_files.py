"""Files that are whole or not there, and readable as the umask says."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from selfmask_dist.common.files import replacing, write_json


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_files_are_readable_as_the_umask_says(tmp_path: Path, umask: int) -> None:
    """safetensors alone makes files that only the owner can read."""
    path = tmp_path / "head.safetensors"
    with replacing(path) as partial:
        save_file({"weight": torch.zeros(3)}, partial)
    write_json(tmp_path / "result.json", {"loss": 0.5})
    for file in tmp_path.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~umask, file


def test_a_writer_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"loss": 0.5})
    before = path.read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"loss": float("nan")})
    with pytest.raises(FileExistsError), replacing(path) as partial:
        partial.mkdir()  # the temporary file is there: the writer fails
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]
