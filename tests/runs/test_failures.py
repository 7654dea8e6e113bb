"""What a machine does to a run: a full disk, a killed data worker, peers that are gone."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from launchers import local
from launchers import restarts as progress
from selfmask_dist.parallel import is_lost_peer, set_timeout
from selfmask_dist.runs.checkpoint import committed, load_newest, step_of
from selfmask_dist.runs.exit_status import BAD_INPUT, FAILED, HUNG, LOST, REQUEUE
from selfmask_dist.runs.metrics import _Lines
from tests.launchers.test_launchers import fake
from tests.support.distributed import run_distributed
from tests.support.tiny_run import (
    child_environment,
    steps_of,
    submit_command,
    wait_until,
    write_config,
    write_tiny_data,
)

# ---- peers


def _is_lost_after_a_timeout() -> tuple[bool, float]:
    dist.all_reduce(torch.ones(1))
    wide = dist.new_group()
    set_timeout(timedelta(seconds=0.5))
    start = time.monotonic()
    if dist.get_rank() == 0:
        try:
            dist.all_reduce(torch.ones(1), group=wide)  # any group, not only the first
        except RuntimeError as error:
            return is_lost_peer(error), time.monotonic() - start
    time.sleep(2.0)
    return False, 0.0


@pytest.mark.distributed
def test_a_collective_waits_as_long_as_it_was_told_and_is_known_as_a_lost_peer() -> None:
    (is_lost, seconds), _ = run_distributed(_is_lost_after_a_timeout)
    assert is_lost
    assert 0.4 < seconds < 2.0


def test_a_place_where_nobody_meets_is_a_lost_peer_and_a_bug_is_not() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(RuntimeError) as caught:
            dist.TCPStore("127.0.0.1", taken.getsockname()[1], 2, is_master=True)
    assert is_lost_peer(caught.value)
    for bug in (RuntimeError("shapes do not match"), ValueError("Timed out waiting"), KeyError("x")):
        assert not is_lost_peer(bug)


def test_a_run_whose_processes_all_lost_a_peer_starts_again(tmp_path: Path) -> None:
    def plan(restart: int) -> list[local.Process]:
        code = f"raise SystemExit({LOST})" if restart < 2 else "print('through')"
        return [fake(rank, code) for rank in range(2)]

    assert local.run_processes(plan, logs=tmp_path / "logs", max_restarts=2) == 0
    assert local.run_processes(plan, logs=tmp_path / "logs", max_restarts=1) == LOST


@pytest.mark.parametrize(("status", "starts"), [(FAILED, 1), (BAD_INPUT, 1), (HUNG, 2)])
def test_who_lost_a_peer_leaves_the_verdict_to_it(tmp_path: Path, status: int, starts: int) -> None:
    seen = []

    def plan(restart: int) -> list[local.Process]:
        seen.append(restart)
        late = f"import time; time.sleep(0.5); raise SystemExit({status})"
        return [fake(0, f"raise SystemExit({LOST})"), fake(1, late)]

    assert local.run_processes(plan, logs=tmp_path / "logs", max_restarts=1) == status
    assert len(seen) == starts


def test_starts_that_come_to_nothing_end_and_progress_counts_anew(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def plan(restart: int) -> list[local.Process]:
        seen.append(restart)
        if restart == 3:
            (tmp_path / "checkpoints" / "step-000000004").mkdir(parents=True)
        return [fake(0, "import os; os.kill(os.getpid(), 9)")]

    assert local.run_processes(plan, logs=tmp_path / "logs", max_restarts=50) == 128 + 9
    assert len(seen) == 3 + progress.MAX_FRUITLESS
    assert "5 starts in a row came to nothing" in capfd.readouterr().err
    assert progress.why_not_again(tmp_path / "logs", "another job", LOST, 50) is None


def test_failures_are_counted_and_stops_are_not(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    why = partial(progress.why_not_again, logs, "job 7")
    for step in range(10):  # each preempted start leaves a checkpoint
        (tmp_path / "checkpoints" / f"step-{step:09d}").mkdir(parents=True)
        assert why(REQUEUE, 2) is None
    assert why(LOST, 2) is None
    assert why(-9, 2) is None
    assert why(REQUEUE, 2) is None
    assert why(HUNG, 2) == "2 restarts after failures were launch.max_restarts"
    assert progress.why_not_again(logs, "job 8", REQUEUE, 0) == "launch.max_restarts is 0"


def test_a_run_that_is_always_stopped_too_early_ends(tmp_path: Path) -> None:
    reasons = [progress.why_not_again(tmp_path, "job 7", REQUEUE, 1) for _ in range(progress.MAX_STOPPED)]
    assert reasons[:-1] == [None] * (progress.MAX_STOPPED - 1)
    assert "launch.hours" in str(reasons[-1])


# ---- a full disk


def test_lines_that_a_full_disk_refuses_wait_for_space(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text('{"step": 0}\n{"st')
    _Lines(tmp_path / "a.jsonl").close()  # drops the half line
    lines = _Lines(Path("/dev/full"))
    lines.write({"step": 1})
    assert "No space left on device; its lines wait" in capsys.readouterr().err
    lines._stream.close()
    lines._stream = open(tmp_path / "a.jsonl", "ab", buffering=0)  # noqa: SIM115
    lines.write({"step": 2})
    lines.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "a.jsonl").read_text().splitlines()] == [0, 1, 2]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if os.geteuid() or shutil.which("mount") is None:
        pytest.skip("mounting a small file system needs root, and the program mount")
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Leave no byte; the file to delete again."""
    path = folder / "filler"
    with open(path, "wb", buffering=0) as stream:
        try:
            while True:
                stream.write(bytes(4096))
        except OSError:
            return path


@pytest.mark.slow
def test_a_full_disk_costs_checkpoints_and_no_run(tmp_path: Path, small_disk: Path) -> None:
    config = write_config(
        tmp_path / "tiny.yaml",
        write_tiny_data(tmp_path / "data"),
        train={"epochs": 100, "global_batch_size": 12},
        checkpoint={"every_steps": 3},
        run={"dir": str(small_disk), "name": "run"},
    )
    run = small_disk / "run"
    # not through the launcher, which refuses so small a disk
    command = [sys.executable, "-m", "selfmask_dist.cli", "train", f"--config={config}"]
    with subprocess.Popen(command, env=child_environment(), stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: len(steps_of(run)) > 10)
        filler = fill(small_disk)
        saved = step_of(committed(run / "checkpoints")[0])
        time.sleep(0.3)
        filler.unlink()  # for a while only: it goes on as if nothing had been
        wait_until(lambda: step_of(committed(run / "checkpoints")[0]) > saved + 3)
        fill(small_disk)
        assert process.stderr is not None
        said = process.stderr.read()
    assert process.returncode == BAD_INPUT, said  # the mask does not fit: the user's to mend
    assert "could not be saved" in said
    assert f"MB and {run / 'checkpoints'} has 0.0 MB free" in said
    assert "make room and go on with run.resume=true" in said
    newest = load_newest(run / "checkpoints", set_aside=False)
    assert newest is not None
    filler.unlink()
    done = subprocess.run(
        [*command, "run.resume=true"], env=child_environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert steps_of(run) == list(range(1, 401))
    assert (run / "result.json").exists()


# ---- a data loading worker


@pytest.mark.slow
def test_a_killed_data_worker_is_named_and_the_run_starts_again(tmp_path: Path) -> None:
    data = write_tiny_data(tmp_path / "data")
    config = write_config(
        tmp_path / "tiny.yaml", data, train={"epochs": 40, "global_batch_size": 12}, engine={"workers": 1}
    )
    run = tmp_path / "run"
    command = submit_command(config, "checkpoint.every_steps=5", nodes=1)
    with subprocess.Popen(command, env=child_environment(), stderr=subprocess.PIPE, text=True) as launcher:
        wait_until(lambda: len(steps_of(run)) > 10)
        os.kill(data_worker(run), signal.SIGKILL)
        assert launcher.stderr is not None
        said = launcher.stderr.read()
    assert launcher.returncode == 0, said
    assert "a data loading worker ended by itself (SIGKILL), most likely out of memory" in said
    assert f"ended with status {LOST}" in said
    assert steps_of(run) == list(range(1, 161))


def data_worker(run: Path) -> int:
    """The process that decodes for the run's only rank: the child of its fork server."""
    rank = json.loads((run / "status.json").read_text())["pid"]
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    servers = [pid for pid, parent in parents.items() if parent == rank]
    workers = [pid for pid, parent in parents.items() if parent in servers]
    assert workers, (rank, servers)
    return workers[0]
