"""What would fail minutes or hours later, said before anything starts.

Every check looks at the configuration, the file system or the cluster and returns complaints. Knows nothing
of training and reads no image.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from selfmask_dist.config import Config


def preflight(config: Config, *, cluster: str, num_nodes: int) -> None:
    """Raises ValueError with every complaint, each with its way out."""
    complaints = [*_run_complaints(config)]
    if complaints:
        raise ValueError("\n       ".join(complaints))


def _run_complaints(config: Config) -> Iterator[str]:
    run = Path(config.run.dir) / config.run.name
    if (run / "config.yaml").exists() and not config.run.overwrite:
        yield f"{run} holds a run already; set run.name to another name, or run.overwrite=true"
    parent = next(folder for folder in (run, *run.resolve().parents) if folder.exists())
    if not os.access(parent, os.W_OK):
        yield f"{parent} is not writable; set run.dir to a folder that is"
