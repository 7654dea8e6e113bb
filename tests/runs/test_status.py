"""`selfmask status`, `logs` and `checkpoints` on folders of every kind: aligned, with units, no traceback."""

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from launchers.preflight import preflight
from selfmask_dist.cli import main
from selfmask_dist.config import load_config
from selfmask_dist.runs.checkpoint import Checkpoint, write_checkpoint
from selfmask_dist.runs.status import read_status
from selfmask_dist.runs.submitted import note_jobs, waiting


def make_run(folder: Path, **status: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("seed: 0\n")
    if status:
        (folder / "status.json").write_text(json.dumps(status))
    return folder


def running(step: int, **facts: Any) -> dict[str, Any]:
    numbers = {"step": step, "num_steps": 4000, "loss": 0.5, "images_per_second": 123.4, "restarts": 2}
    return {"state": "running", "time": time.time(), "silence": 0.1, **numbers, **facts}


def save(run: Path, step: int) -> Path:
    return write_checkpoint(run / "checkpoints", Checkpoint({"a": torch.zeros(500_000)}, {}), step=step)


def test_a_table_of_runs_in_all_states(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["status"]) == 2
    assert "there are no runs in ./runs" in capsys.readouterr().err
    save(make_run(tmp_path / "runs" / "a", **running(7, job="12")), 5)
    make_run(tmp_path / "runs" / "b-long-name", **running(1234, silence=300.0))
    make_run(tmp_path / "runs" / "c", **running(3, time=time.time() - 10_000))
    make_run(tmp_path / "runs" / "d")
    make_run(tmp_path / "runs" / "e").joinpath("status.json").write_text('{"state": "runni')
    make_run(tmp_path / "runs" / "f", time="yesterday", step=None, state=["?"])
    cascade = make_run(tmp_path / "runs" / "g", **running(3, stage="expert-1"))
    os.utime(save(cascade / "dispatcher", 9).parent / "latest", (1, 1))
    save(cascade / "expert-1", 3)
    assert main(["status"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines]
    assert rows[0][:6] == ["a", "running", "7/4000", "0.5000", "123", "2"]
    seconds = rows[0].pop(7)
    assert int(seconds) < 60
    assert rows[0][6:] == ["step-000000005", "s", "ago", "12"]
    assert "still for 5 min" in lines[1]
    assert "silent" in lines[2]
    assert "3 h ago" in lines[2]
    assert all("no heartbeat" in line for line in lines[3:5])
    assert "running (expert-1)" in lines[6]
    assert "expert-1/step-000000003" in lines[6]
    end = header.index("step") + len("step")  # numbers stand under the end of their heading
    assert [line[end - 5 : end] for line in lines[:2]] == ["/4000", "/4000"]
    assert header.index("state") == lines[1].index("still")


def test_a_folder_that_is_no_run_does_not_hide_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (make_run(tmp_path / part / "same", **running(1)) for part in "ab")
    assert main(["status", str(first), str(tmp_path / "nowhere"), str(second)]) == 2
    shown = capsys.readouterr()
    assert [line.split()[0] for line in shown.out.splitlines()[1:]] == [str(first), str(second)]
    assert f"{tmp_path / 'nowhere'} is not a run" in shown.err


def test_logs_of_a_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "a")
    assert main(["logs", str(run)]) == 2
    assert "there are no logs" in capsys.readouterr().err
    (run / "logs").mkdir()
    for rank in (0, 2, 10):
        (run / "logs" / f"rank-{rank}.log").write_bytes(
            b"".join(b"line %d\n" % i for i in range(100)) + b"\xff\n"
        )
    assert main(["logs", str(run), "--rank", "3"]) == 2
    assert "there are ranks 0, 2, 10" in capsys.readouterr().err
    assert main(["logs", str(run), "--rank", "2", "--lines", "3"]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == ["line 98", "line 99"]
    for name in (".ends-7-0/rank-10.2", ".ends-7-1/rank-0.137", ".ends-7-1/rank-2.2"):
        note = run / "logs" / name
        note.parent.mkdir(exist_ok=True)
        note.touch()
        os.utime(note.parent, (int(name[8]), int(name[8])))
    assert main(["logs", str(run)]) == 0
    assert "(rank 2, which ended with an error of its own, status 2)" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["logs", str(run), "--lines", "0"])


def test_checkpoints_of_runs_of_every_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "a", **running(12))
    (run / "checkpoints").mkdir()
    assert main(["checkpoints", "list", str(run)]) == 0
    assert "none is committed yet" in capsys.readouterr().out
    for step in (9, 12):
        save(run, step)
    assert main(["checkpoints", "list", str(run)]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["checkpoint", "step", "size", "saved"]
    for line, number in zip(lines, ("12", "9"), strict=True):
        *words, seconds, unit, ago = line.split()[1:]
        assert (*words, unit, ago) == (number, "2.0", "MB", "s", "ago")
        assert int(seconds) < 60
    assert main(["checkpoints", "prune", str(run)]) == 2
    assert "is running and prunes by itself" in capsys.readouterr().err
    (run / "status.json").unlink()
    assert main(["checkpoints", "prune", str(run)]) == 0
    assert capsys.readouterr().out.split() == ["deleted", "step-000000009"]
    assert main(["checkpoints", "verify", str(run)]) == 0
    assert capsys.readouterr().out.splitlines()[1].endswith("valid")
    with pytest.raises(SystemExit):
        main(["checkpoints", "prune", str(run), "--keep", "0"])
    save(make_run(tmp_path / "cascade") / "dispatcher", 1)
    assert main(["checkpoints", "list", str(tmp_path / "cascade")]) == 2
    assert f"those of its stages are in {tmp_path / 'cascade' / 'dispatcher'}" in capsys.readouterr().err


SQUEUE = """#!/bin/sh
echo "$@" >> {log}
printf '%b' '{answer}'
"""


@pytest.mark.parametrize(
    ("answer", "state"),
    [
        ("12 PENDING\\n", "pending"),
        ("12 COMPLETED\\n13 PENDING\\n", "pending"),
        ("12 RUNNING\\n13 PENDING\\n", None),
    ],
)
def test_a_job_that_waits_is_pending(
    answer: str,
    state: str | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "bin").mkdir()
    squeue = tmp_path / "bin" / "squeue"
    squeue.write_text(SQUEUE.format(log=tmp_path / "asked", answer=answer))
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "c3"
    run.mkdir(parents=True)
    note_jobs(run, ["12", "13"])
    status = main(["status"])
    shown = capsys.readouterr()
    assert "--jobs=12,13" in (tmp_path / "asked").read_text()
    if state is None:  # it runs, and has not written anything yet
        assert (status, "is not a run" in shown.err) == (2, True)
        return
    job = "12" if answer.startswith("12 P") else "13"
    assert shown.out.splitlines()[1].split()[:2] == ["c3", state]
    assert shown.out.splitlines()[1].split()[-1] == job
    assert main(["report", str(run)]) == 2
    assert f"has not begun: SLURM job {job} is pending" in capsys.readouterr().err
    with pytest.raises(ValueError, match=f"SLURM job {job} is to make"):
        preflight(load_config(None, ["run.name=c3"]), cluster="local", num_nodes=1)
    (run / "config.yaml").write_text("seed: 0\n")  # requeued
    (run / "status.json").write_text(json.dumps(running(7, state="preempted")))
    assert main(["status", str(run)]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["c3", "pending", "7/4000"]


def test_a_rank_that_makes_the_others_wait_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks = {"forward": [0.2, 0.21, 0.4, 0.2], "data": [0.0, 0.001, 0.0, 1.5]}
    run = make_run(tmp_path / "a", **running(7, ranks=ranks))
    assert main(["status", str(run)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "is slow" in line]
    assert lines == [
        "a: rank 2 is slow: its forward passes take 400 ms a step, 205 ms in the middle of all",
        "a: rank 3 is slow: it waits for data for 1.5 s a step, 0 ms in the middle of all",
    ]
    assert "most memory" not in capsys.readouterr().out
    run = make_run(tmp_path / "c", **running(7, ranks={"memory_mib": [1024.0, 1536.0, 4096.0, 1024.0]}))
    assert main(["status", str(run)]) == 0
    held = "c: most memory held: 4.00 GiB on rank 2, 1.25 in the middle of all 4"
    assert held in capsys.readouterr().out.splitlines()
    damaged = make_run(
        tmp_path / "b", **running(7, ranks={"memory_mib": [1.0, "x"], "forward": ["x", 1.0], "data": 3})
    )
    assert main(["status", str(damaged)]) == 0


def test_why_and_since_when_a_job_waits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    squeue = tmp_path / "bin" / "squeue"
    since = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() - 7200))
    answer = f"12 PENDING {since} ReqNodeNotAvail, UnavailableNodes:n1"
    squeue.write_text(SQUEUE.format(log=tmp_path / "asked", answer=answer))
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    run = tmp_path / "c3"
    run.mkdir()
    note_jobs(run, ["12"])
    said = "waits in SLURM as job 12 (ReqNodeNotAvail, UnavailableNodes:n1), since 2 h"
    assert main(["status", str(run)]) == 0
    assert said in capsys.readouterr().out
    assert main(["logs", str(run)]) == 2
    assert said in capsys.readouterr().err
    (run / "logs").mkdir()
    (run / "logs" / "rank-0.log").write_text("of the start before\n")
    assert main(["logs", str(run)]) == 0
    shown = capsys.readouterr()
    assert (shown.out, said in shown.err) == ("of the start before\n", True)


def test_without_squeue_a_submitted_run_that_has_not_begun_is_pending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    note_jobs(tmp_path, ["5"])
    assert read_status(tmp_path)["state"] == "pending"
    assert re.fullmatch(r"waits in SLURM as job 5, since \d+ s", str(waiting(tmp_path)))
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    assert read_status(tmp_path)["state"] == "no heartbeat"
