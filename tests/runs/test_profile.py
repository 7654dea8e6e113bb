"""Traces of chosen steps: written by a real run, with the trainer's parts in them; and after a stop."""

import gzip
import json
from pathlib import Path

import pytest

from selfmask_dist.cli.train import run
from selfmask_dist.config import load_config
from selfmask_dist.runs.speed.profile import StepProfiler, part
from tests.support.tiny_run import write_config, write_tiny_data


def events(path: Path) -> list[str]:
    return [event["name"] for event in json.loads(gzip.open(path).read())["traceEvents"] if "name" in event]


def test_a_run_traces_the_steps_that_are_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path / "tiny.yaml", write_tiny_data(tmp_path / "data"), eval={"final": False})
    run(load_config(path, ["run.name=a", "run.profile=[1, 3]", "eval.knn_every=0"]))
    folder = next(tmp_path.rglob("a/profile"))
    found = events(folder / "rank-0.json.gz")
    for name in ("gradients", "loss and votes", "step"):
        assert found.count(f"selfmask: {name}") == 2, "of the steps 1 and 2"
    assert "aten::linear" in found
    assert "selfmask: gradients" in (folder / "rank-0.txt").read_text()
    assert "profile of the steps 1 to 2" in capsys.readouterr().err
    for span in ("[3, 3]", "[1000, 1001]"):
        with pytest.raises(ValueError, match="traces no step"):
            run(load_config(path, ["run.name=b", f"run.profile={span}", "run.overwrite=true"]))


def test_what_a_stop_leaves_is_written_and_nothing_where_no_step_came(tmp_path: Path) -> None:
    said: list[str] = []
    profiler = StepProfiler(tmp_path / "p", 3, (2, 9), report=said.append)
    profiler.close()
    assert not (tmp_path / "p").exists()
    profiler.before_step(2)
    with part("gradients"):
        pass
    profiler.after_step(2)
    assert not said
    profiler.close()
    assert "selfmask: gradients" in events(tmp_path / "p" / "rank-3.json.gz")
    assert len(said) == 1
    profiler.close()
    assert len(said) == 1
