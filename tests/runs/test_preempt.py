"""Being stopped: any rank's signal stops all at one step, the run goes on bit for bit, hangs are noticed."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from selfmask_dist.cli import main
from selfmask_dist.parallel import World
from selfmask_dist.runs.context import RunContext
from selfmask_dist.runs.exit_status import HUNG, REQUEUE
from selfmask_dist.runs.metrics import MetricsWriter
from selfmask_dist.runs.preempt import Preempted, StopRequest
from selfmask_dist.runs.watchdog import Watchdog
from tests.support.distributed import run_distributed
from tests.support.tiny_run import (
    child_environment,
    events_of,
    processes_of,
    rank_process,
    result_of,
    steps_of,
    submit_command,
    wait_until,
    write_config,
    write_tiny_data,
)


@pytest.fixture(scope="module")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_tiny_data(tmp_path_factory.mktemp("data"))


def config_of(folder: Path, data: dict[str, str], **sections: Any) -> Path:
    train = {"epochs": 40, "global_batch_size": 12, **sections.pop("train", {})}
    return write_config(folder / "tiny.yaml", data, optim={"score_lr": 300.0}, train=train, **sections)


def losses_of(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def started(run: Path, number: int) -> bool:
    return sum(event["event"] == "start" for event in events_of(run)) >= number


def stepped(run: Path, number: int) -> bool:
    return len(steps_of(run)) >= number


# ---- the parts


def test_a_signal_is_heard_while_the_main_thread_is_blocked() -> None:
    with StopRequest() as stop:
        assert not stop.requested
        heard = threading.Thread(target=lambda: wait_until(lambda: stop.requested, 5))
        heard.start()
        os.kill(os.getpid(), signal.SIGUSR2)
        heard.join()
        assert stop.reason == "SIGUSR2"


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(signum) for signum in (signal.SIGUSR2, signal.SIGTERM)]
    with StopRequest():
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert [signal.getsignal(signum) for signum in (signal.SIGUSR2, signal.SIGTERM)] == before


def test_a_stop_that_takes_too_long_is_forced(tmp_path: Path) -> None:
    ended: list[int] = []
    with StopRequest(force_after=0.1, stacks=tmp_path / "stacks.txt", exit_process=ended.append):
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: ended, 5)
    assert ended == [REQUEUE]
    assert "test_a_stop_that_takes_too_long_is_forced" in (tmp_path / "stacks.txt").read_text()


def test_the_watchdog_dumps_and_ends_what_hangs_and_leaves_what_moves(tmp_path: Path) -> None:
    ended: list[int] = []
    silences: list[float] = []
    with Watchdog(
        timeout=0.4, stacks=tmp_path / "s.txt", heartbeat=silences.append, exit_process=ended.append
    ) as dog:
        for _ in range(10):
            time.sleep(0.1)
            dog.beat()
        assert ended == []
        wait_until(lambda: ended, 5)
    assert ended == [HUNG]
    assert "nothing moved" in (tmp_path / "s.txt").read_text()
    assert len(silences) > 5


# ---- runs


def _train_rank(config: Path, name: str, resume: bool, signalled: int | None = None) -> int:
    """Train on this rank and return the exit status; rank `signalled` gets a signal after nine steps."""

    def send() -> None:
        wait_until(partial(stepped, config.parent / name, 9))
        os.kill(os.getpid(), signal.SIGUSR2)

    if os.environ["RANK"] == str(signalled):
        threading.Thread(target=send).start()
    overrides = [f"run.name={name}", f"run.resume={str(resume).lower()}"]
    return main(["train", "--config", str(config), *overrides])


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, tiny_data: dict[str, str]) -> Path:
    """A run that nobody interrupts."""
    config = config_of(tmp_path_factory.mktemp("calm"), tiny_data, eval={"knn_every": 5, "knn_k": [5]})
    assert run_distributed(_train_rank, 2, config, "calm", False, backend="", timeout=120) == [0, 0]
    return config.parent / "calm"


def check_equal(run: Path, calm: Path, expected: list[str]) -> None:
    """Hold a run against the calm one, and its stops and fresh starts against the expected ones."""
    assert (run / "final.mask").read_bytes() == (calm / "final.mask").read_bytes()
    assert losses_of(run) == losses_of(calm)  # none left out, none twice
    events = events_of(run)
    assert [e["event"] for e in events if e["event"] in ("preempted", "resume")] == expected
    for before, event in itertools.pairwise(events):  # announced: saved at the very step
        if event["event"] == "preempted":
            assert before["event"] == "checkpoint"


@pytest.mark.distributed
def test_a_preempted_run_ends_as_if_nothing_had_been(
    calm: Path, tmp_path: Path, tiny_data: dict[str, str]
) -> None:
    config = config_of(
        tmp_path, tiny_data, eval={"knn_every": 5, "knn_k": [5]}, checkpoint={"every_steps": 7}
    )
    stopped = run_distributed(_train_rank, 2, config, "a", False, 1, backend="", timeout=120)
    assert stopped == [REQUEUE, REQUEUE]
    assert 9 <= len(steps_of(tmp_path / "a")) < 160
    assert run_distributed(_train_rank, 2, config, "a", True, backend="", timeout=120) == [0, 0]
    check_equal(tmp_path / "a", calm, ["preempted", "resume"])


@pytest.mark.slow
def test_preempted_and_killed_a_run_ends_as_if_nothing_had_been(
    calm: Path, tmp_path: Path, tiny_data: dict[str, str]
) -> None:
    config = config_of(
        tmp_path, tiny_data, eval={"knn_every": 5, "knn_k": [5]}, checkpoint={"every_steps": 7}
    )
    run = tmp_path / "stormy"
    command = submit_command(config, "run.name=stormy", "engine.workers=1")
    storms = ((1, signal.SIGUSR2), (0, signal.SIGTERM), (1, signal.SIGKILL))
    with subprocess.Popen(command, env=child_environment(), stderr=subprocess.PIPE, text=True) as launcher:
        for number, (rank, signum) in enumerate(storms):
            wait_until(partial(started, run, number + 1))
            first = len(steps_of(run))
            wait_until(partial(stepped, run, first + 9))
            os.kill(rank_process(tmp_path, rank, "stormy"), signum)
        assert launcher.stderr is not None
        said = launcher.stderr.read()
    assert launcher.returncode == 0, said
    assert "restart 3" in said
    assert "killed by SIGKILL" in said
    check_equal(run, calm, ["preempted", "resume", "preempted", "resume", "resume"])
    assert not processes_of(tmp_path)


@pytest.mark.slow
def test_a_hung_rank_is_noticed_dumped_and_started_again(tmp_path: Path, tiny_data: dict[str, str]) -> None:
    config = config_of(tmp_path, tiny_data, checkpoint={"every_steps": 5, "hang_minutes": 0.05})
    command = submit_command(config, "run.name=hung")
    run = tmp_path / "hung"
    with subprocess.Popen(command, env=child_environment(), stderr=subprocess.PIPE, text=True) as launcher:
        wait_until(lambda: len(steps_of(run)) > 7)
        started = time.monotonic()
        os.kill(rank_process(tmp_path, 1, "hung"), signal.SIGSTOP)
        wait_until(lambda: (run / "stacks" / "rank-0.txt").exists())
        assert time.monotonic() - started < 3 + 10
        assert launcher.stderr is not None
        said = launcher.stderr.read()
    assert launcher.returncode == 0, said
    assert f"ended with status {HUNG}" in said
    assert "trainer.py" in (run / "stacks" / "rank-0.txt").read_text()
    assert "most recent call first" in (run / "logs" / "rank-1.log").read_text()  # the stopped one, woken
    assert result_of(run)["steps"] == 160


@pytest.mark.slow
def test_a_signal_while_evaluating_stops_all_ranks(tmp_path: Path, tiny_data: dict[str, str]) -> None:
    config = config_of(
        tmp_path, tiny_data, eval={"batch_size": 1, "frozen_baseline": True}, launch={"max_restarts": 0}
    )
    command = submit_command(config, "run.name=a")
    with subprocess.Popen(command, env=child_environment(), stderr=subprocess.PIPE, text=True) as launcher:
        wait_until(lambda: any(event["event"] == "start" for event in events_of(tmp_path / "a")))
        os.kill(rank_process(tmp_path, 1, "a"), signal.SIGUSR2)
        assert launcher.wait(60) == REQUEUE
    assert [event["event"] for event in events_of(tmp_path / "a")] == ["start", "preempted"]


def test_status_and_logs_tell_from_files_alone(
    calm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "a"
    shutil.copytree(calm, run)
    assert main(["status", str(run)]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    for part in ("finished", "160/160", "step-000000160"):
        assert part in line
    (run / "result.json").unlink()
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps({**status, "state": "running", "time": 0}))
    assert main(["status", str(run)]) == 0
    assert "silent" in capsys.readouterr().out
    (run / "logs").mkdir()
    (run / "logs" / "rank-1.log").write_text("---- start 0\nwhat it printed\n")
    assert main(["logs", str(run), "--rank", "1"]) == 0
    assert "what it printed" in capsys.readouterr().out
    assert main(["logs", str(run), "--rank", "7"]) == 2
    assert main(["status", str(tmp_path)]) == 2


def _turns_until_stopped(directory: Path) -> tuple[int, int]:
    world = World(dist.get_rank(), dist.get_world_size())
    votes = [0]

    class Counting(World):
        def sum(self, tensor: torch.Tensor) -> torch.Tensor:
            votes[0] += 1
            return super().sum(tensor)

    counting = Counting(world.rank, world.size)
    stop = StopRequest()
    watchdog = Watchdog(timeout=0, stacks=directory / "stacks")
    context = RunContext(directory, counting, MetricsWriter(None), stop, watchdog, None)
    check = context.paced_check()
    turn = 0
    try:
        while True:
            turn += 1
            time.sleep(0.002 if world.is_main else 0.0005)  # ranks differ in speed
            if turn == 600 and world.rank == 1:
                stop.reason = "SIGTERM"
            check()
    except Preempted:
        return turn, votes[0]


@pytest.mark.distributed
def test_a_paced_check_votes_seldom_and_in_the_same_turns(tmp_path: Path) -> None:
    main, other = run_distributed(_turns_until_stopped, 2, tmp_path)
    assert main == other
    turns, votes = main
    assert 600 <= turns <= 600 + 256
    assert votes < 20


_RECORDED = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from selfmask_dist.runs.watchdog import dump_collectives
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
dist.all_reduce(torch.ones(7))
dump_collectives(Path(sys.argv[1]))
"""


def test_the_last_collectives_are_written_beside_the_stacks(tmp_path: Path) -> None:
    path = tmp_path / "rank-0.collectives.json"
    subprocess.run(
        [sys.executable, "-c", _RECORDED, str(path)],
        env=child_environment(TORCH_FR_BUFFER_SIZE="100"),
        check=True,
        timeout=60,
    )
    (entry,) = json.loads(path.read_text())["entries"]
    assert (entry["profiling_name"], entry["input_sizes"]) == ("gloo:all_reduce", [[7]])
