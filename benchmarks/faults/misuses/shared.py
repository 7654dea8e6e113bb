"""What the cases of commands share: data, a configuration and a finished run, made once in a process."""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

from benchmarks.faults.misuses.case import selfmask, told
from tests.support.tiny_run import write_config, write_tiny_data


@cache
def place() -> Path:
    """Return a folder that lasts as long as this process."""
    folder = Path(tempfile.mkdtemp(prefix="misuse-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def data() -> dict[str, str]:
    """Return tiny shards of three colours."""
    return write_tiny_data(place() / "data")


def config(folder: Path, **sections: object) -> Path:
    """Return a configuration whose runs go into `folder`."""
    return write_config(folder / "tiny.yaml", data(), **sections)


@cache
def finished() -> Path:
    """Return the folder of a run of one step that is done."""
    path = config(place() / "runs", eval={"final": False})
    told(selfmask("train", "--config", path, "run.name=done", "train.max_steps=1", "optim.score_lr=300"))
    return path.parent / "done"
