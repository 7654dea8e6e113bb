"""One run, one owner: a living one is not disturbed, a dead one's run is free, resumes say what they find."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from selfmask_dist.cli import main
from selfmask_dist.runs import owner
from selfmask_dist.runs.owner import FREE_AFTER_SECONDS, Claim, RunHeldError, check_free
from tests.support.tiny_run import (
    child_environment,
    events_of,
    result_of,
    submit,
    submit_command,
    wait_until,
    write_config,
    write_tiny_data,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_tiny_data(tmp_path_factory.mktemp("data"))


def record(folder: Path, file: str = "owner.json", **facts: Any) -> None:
    values = {"pid": 1, "host": "elsewhere", "machine": "elsewhere", "time": time.time(), "restarts": 0}
    (folder / file).write_text(json.dumps({**values, **facts}))


@pytest.fixture
def ended() -> int:
    """The number of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_an_owner_elsewhere_is_judged_by_its_heartbeat(tmp_path: Path) -> None:
    for file in ("owner.json", "status.json"):
        record(tmp_path, file, job="77", time=time.time() - 30, state="running")
        with pytest.raises(RunHeldError, match="process 1 on elsewhere, SLURM job 77, heartbeat 30 s ago"):
            check_free(tmp_path)
        record(tmp_path, file, time=time.time() - FREE_AFTER_SECONDS - 1)
        check_free(tmp_path)
    record(tmp_path, "status.json", state="preempted")
    check_free(tmp_path)
    for damaged in ("", "{", "[]", '{"time": "now", "pid": [], "launcher": 3}'):
        (tmp_path / "owner.json").write_text(damaged)
        check_free(tmp_path)


def test_an_owner_here_is_judged_by_its_process(tmp_path: Path, ended: int) -> None:
    here = {**owner.identity(), "time": time.time() - 9999}  # even where it has been silent for long
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    record(tmp_path, **{**here, "pid": process.pid, "started": owner._started(process.pid)})
    with pytest.raises(RunHeldError, match=f"process {process.pid} on {socket.gethostname()}"):
        check_free(tmp_path)
    record(tmp_path, **{**here, "pid": process.pid, "started": 1})  # another one's number, used again
    check_free(tmp_path)
    record(tmp_path, **{**here, "pid": process.pid, "started": owner._started(process.pid)})
    process.kill()
    wait_until(
        lambda: owner._state(process.pid)[0] == "Z"
    )  # as a launcher that is not done waiting leaves it
    check_free(tmp_path)
    process.communicate()
    record(tmp_path, **{**here, "pid": ended, "time": time.time()})
    check_free(tmp_path)


def test_a_job_that_is_started_again_on_another_node_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(tmp_path, job="77", restarts=1)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SELFMASK_RESTARTS", "2")
    check_free(tmp_path)
    monkeypatch.setenv("SELFMASK_RESTARTS", "1")  # two steps of one job
    with pytest.raises(RunHeldError):
        check_free(tmp_path)


def test_a_claim_is_exclusive_and_leaves_nothing(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from selfmask_dist.runs.owner import Claim\n"
        "with Claim(Path(sys.argv[1])): print('held', flush=True); input()"
    )
    folder = tmp_path / "a"
    children = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    wait_until(lambda: sum(child.poll() is not None for child in children) == 3)
    (holder,) = [child for child in children if child.poll() is None]
    for child in children:
        out, errors = child.communicate("\n") if child is not holder else ("", "RunHeldError")
        assert (out, "RunHeldError" in errors) == ("", True)
    assert holder.communicate("\n")[0] == "held\n"
    assert not folder.exists()


def test_an_owner_that_lost_its_run_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "_RENEW_SECONDS", 0.01)
    codes: list[int] = []
    with Claim(tmp_path, exit_process=codes.append):
        record(tmp_path, token="another")
        wait_until(lambda: codes)
    assert codes == [2]
    assert json.loads((tmp_path / "owner.json").read_text())["token"] == "another"


def test_a_second_start_of_a_living_run_is_refused_and_a_killed_one_is_taken_over(
    tmp_path: Path, data: dict[str, str]
) -> None:
    path = write_config(tmp_path / "tiny.yaml", data, run={"log_every": 1, "progress": False})
    keys = ["run.name=a", "train.epochs=400", "checkpoint.every_steps=1", "eval.final=false"]
    first = subprocess.Popen(
        submit_command(path, *keys, nodes=1), env=child_environment(), stderr=subprocess.DEVNULL
    )
    run = tmp_path / "a"
    try:
        wait_until(lambda: (run / "checkpoints" / "latest").exists())
        pid = json.loads((run / "owner.json").read_text())["pid"]
        for wanted in ("run.resume=true", "run.overwrite=true"):
            second = submit(path, *keys, wanted, nodes=1)
            assert second.returncode == 2
            assert (
                f"{run} is being trained by process {pid} on {socket.gethostname()}, launcher "
                in second.stderr
            )
            assert len(second.stderr.splitlines()) == 1
        train = [sys.executable, "-m", "selfmask_dist.cli", "train", "--config", str(path), *keys]
        third = subprocess.run(
            [*train, "run.resume=true"], env=child_environment(), capture_output=True, text=True, check=False
        )
        assert third.returncode == 2
        assert f"trained by process {pid}" in third.stderr
        first.kill()  # its process goes on, and holds the run
        assert submit(path, *keys, "run.resume=true", nodes=1).returncode == 2
        os.kill(pid, signal.SIGKILL)
        killed = time.monotonic()
        fourth = subprocess.Popen(
            submit_command(path, *keys, "run.resume=true", nodes=1), env=child_environment()
        )
        wait_until(lambda: any(event["event"] == "resume" for event in events_of(run)))
        assert time.monotonic() - killed < FREE_AFTER_SECONDS
        fourth.terminate()
        assert fourth.wait() == 128 + signal.SIGTERM
        assert not (run / "owner.json").exists()
    finally:
        first.kill()
        first.wait()


def test_resuming_what_is_not_there_or_done_says_so_at_once(
    tmp_path: Path, data: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path / "tiny.yaml", data)
    keys = ["--config", str(path), "train.max_steps=1"]
    assert main(["train", *keys, "run.name=b"]) == 0
    capfd.readouterr()
    assert main(["train", *keys, "run.name=a", "run.resume=true"]) == 2
    said = capfd.readouterr().err
    assert f"run.resume=true and {tmp_path / 'a'} holds no run; in {tmp_path} there are b" in said
    assert not (tmp_path / "a").exists()
    done = submit(path, "run.name=a", "run.resume=true", nodes=1)
    assert (done.returncode, "holds no run" in done.stderr) == (2, True)

    before = result_of(tmp_path / "b"), events_of(tmp_path / "b")
    script = (
        "import sys; from selfmask_dist.cli import main; status = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules; sys.exit(status)"
    )
    command = [sys.executable, "-c", script, "train", *keys, "run.name=b", "run.resume=true"]
    again = subprocess.run(command, env=child_environment(), capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert f"{tmp_path / 'b'} is finished: nothing is left to do\nmasked" in again.stderr
    done = submit(path, "train.max_steps=1", "run.name=b", "run.resume=true", nodes=1)
    assert (done.returncode, "is finished: nothing is left to do" in done.stderr) == (0, True)
    assert (result_of(tmp_path / "b"), events_of(tmp_path / "b")) == before
    done = submit(path, "train.max_steps=1", "run.name=b", "run.resume=true", "seed=5", nodes=1)
    assert (done.returncode, "started with seed=0 and not 5" in done.stderr) == (2, True)
