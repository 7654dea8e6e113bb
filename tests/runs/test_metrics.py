"""What a run writes: a restart goes on with the same wandb run."""

import time
from pathlib import Path

import pytest

from selfmask_dist.runs.metrics import MetricsWriter


def test_a_restart_goes_on_with_the_same_wandb_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    folders = {}
    for name in ("one", "other"):
        directory = tmp_path / name
        directory.mkdir()
        for restart in range(2 if name == "one" else 1):
            if restart:
                time.sleep(1.1)  # wandb names its folders by the second
            with MetricsWriter(directory, wandb_mode="offline", config={"resume": bool(restart)}) as writer:
                writer.scalars(restart, {"loss": 1.0})
        folders[name] = [path.name for path in directory.glob("wandb/offline-run-*/run-*.wandb")]
    assert len(folders["one"]) == 2
    assert len(set(folders["one"])) == 1  # the file is named after the id
    assert set(folders["one"]).isdisjoint(folders["other"])
