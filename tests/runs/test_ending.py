"""How processes end after an error: what they call it, what they tell each other, how soon they are gone."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from launchers import local, requeue
from selfmask_dist.config import load_config
from selfmask_dist.data import WorkerLostError
from selfmask_dist.parallel import World
from selfmask_dist.runs.context import open_run
from selfmask_dist.runs.ending.leaving import Departure, status_of
from selfmask_dist.runs.ending.notes import FOLDER_VARIABLE, EndNotes
from selfmask_dist.runs.exit_status import BAD_INPUT, DEVICE, DIVERGED, FAILED, HUNG, LOST, REQUEUE
from selfmask_dist.runs.preempt import Preempted, StopRequest
from tests.support.planted import BUG, DEVICE_FAULT, plant
from tests.support.tiny_run import child_environment, write_config, write_tiny_data

# ---- what an error is called

ADVICE = "\nCUDA kernel errors might be asynchronously reported at some other API call."
NCCL = (
    "NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled cuda error (run with NCCL_DEBUG=INFO), NCCL version "
    "2.27.5\nncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure "
)
SYSTEM = (
    "NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled system error (run with NCCL_DEBUG=INFO), "
    "NCCL version 2.27.5\nncclSystemError: System call (e.g. socket, malloc) or external library call failed"
)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.AcceleratorError(f"CUDA error: uncorrectable ECC error encountered{ADVICE}"), DEVICE),
        (torch.AcceleratorError(f"CUDA error: unspecified launch failure{ADVICE}"), DEVICE),
        (torch.AcceleratorError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"), DEVICE),
        (torch.AcceleratorError("CUDA error: uncorrectable NVLink error detected"), DEVICE),
        (RuntimeError("CUDA error: unknown error"), DEVICE),
        (RuntimeError("NVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus"), DEVICE),
        (dist.DistBackendError(f"{NCCL}'uncorrectable ECC error encountered'"), DEVICE),
        (dist.DistBackendError(f"{NCCL}'out of memory'"), FAILED),
        (dist.DistBackendError(SYSTEM), LOST),
        (torch.AcceleratorError(f"CUDA error: an illegal memory access was encountered{ADVICE}"), FAILED),
        (torch.AcceleratorError(f"CUDA error: device-side assert triggered{ADVICE}"), FAILED),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), FAILED),
        (RuntimeError("Connection closed by peer [127.0.0.1]:1"), LOST),
        (WorkerLostError("a data loading worker ended by itself"), LOST),
        (ValueError("the text has Xid 79 and CUDA error: unknown error"), BAD_INPUT),
        (ArithmeticError("the loss is NaN"), DIVERGED),
        (FileNotFoundError(2, "No such file", "x.tar"), BAD_INPUT),
        (OSError(28, "No space left on device"), BAD_INPUT),
        (OSError(5, "Input/output error"), FAILED),
        (Preempted(), REQUEUE),
        (KeyError("x"), FAILED),
    ],
)
def test_status_of_an_error(error: BaseException, status: int) -> None:
    assert status_of(error) == status


def test_a_device_fault_is_known_below_what_was_raised_from_it() -> None:
    fault = torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered")
    with pytest.raises(RuntimeError) as caught:
        raise RuntimeError("the batch of step 7") from fault
    assert status_of(caught.value) == DEVICE
    with pytest.raises(RuntimeError) as caught:
        raise RuntimeError("the batch of step 7") from KeyError("x")
    assert status_of(caught.value) == FAILED


# ---- what tasks make of it


@pytest.fixture
def notes(tmp_path: Path) -> EndNotes:
    return EndNotes(tmp_path / "logs" / ".ends-7-0")


def test_notes_say_everything_by_their_names(notes: EndNotes) -> None:
    assert notes.statuses() == {}
    notes.tell(3, LOST)
    notes.tell(3, -9)  # said already
    notes.tell(4, -9)
    notes.tell(11, DEVICE, node="gpu-12.site")
    assert notes.statuses() == {3: LOST, 4: 137, 11: DEVICE}
    assert notes.nodes(DEVICE) == ["gpu-12.site"]
    assert notes.say("claimed")
    assert not notes.say("claimed")
    assert notes.has("claimed")
    assert not notes.has("failed")


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which stand-ins for SLURM's two commands write what they are asked for."""
    folder, path = tmp_path / "bin", tmp_path / "asked"
    folder.mkdir()
    for name, answer in (("squeue", "RUNNING"), ("scontrol", "JobId=7 ExcNodeList=n9")):
        (folder / name).write_text(f'#!/bin/sh\necho "$@" >> {path}.{name}\necho {answer}\n')
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(requeue.signal, "signal", lambda *_: None)  # pytest's own handlers stay
    for name, seconds in (("_PEER_SECONDS", 0.4), ("_LOST_SECONDS", 1.5), ("_DEVICE_SECONDS", 0.1)):
        monkeypatch.setattr(requeue, name, seconds)
    monkeypatch.setattr(requeue, "_POLL_SECONDS", 0.02)
    monkeypatch.setattr(requeue, "_LATER_POLL_SECONDS", 0.02)
    monkeypatch.setattr(requeue, "_END_SECONDS", 0.2)
    return Path(f"{path}.scontrol")


def settle(notes: EndNotes, status: int, *, rank: int, num_ranks: int = 2, log: str = "") -> None:
    environment = {"SLURM_JOB_ID": "7", "SLURMD_NODENAME": f"n{rank}"}
    path = notes.folder.parent / f"rank-{rank}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"terminated with exception: CUDA error: before this start\n---- start 0 of job 7\n{log}")
    requeue.Aftermath(environment, notes, path, max_restarts=3).settle(status, rank=rank, num_ranks=num_ranks)


@pytest.mark.parametrize("victim", [LOST, -6, 134])
def test_a_victim_does_not_requeue_a_bug_of_another_rank(notes: EndNotes, asked: Path, victim: int) -> None:
    """Its process said so where the exception was caught; it itself hangs, and its task says nothing yet."""
    notes.tell(1, FAILED)
    settle(notes, victim, rank=0)
    assert not asked.exists()


def test_a_note_that_a_file_system_shows_late_is_waited_for(notes: EndNotes, asked: Path) -> None:
    notes.folder.mkdir(parents=True)
    late = subprocess.Popen(["sh", "-c", f"sleep 0.5; touch {notes.folder}/rank-1.{FAILED}"])
    start = time.monotonic()
    settle(notes, LOST, rank=0, num_ranks=3)
    late.wait()
    assert time.monotonic() - start > 0.4
    assert not asked.exists()


def test_the_wait_is_longer_than_a_minute() -> None:
    """NFS remembers for up to 60 s (acdirmax) that a file was not there."""
    assert requeue._LOST_SECONDS > 60


def test_where_all_ranks_are_victims_the_job_is_requeued_at_once(notes: EndNotes, asked: Path) -> None:
    notes.tell(1, -6)
    start = time.monotonic()
    settle(notes, LOST, rank=0)
    assert time.monotonic() - start < 1.5
    assert asked.read_text().split() == ["requeue", "7"]


def test_a_killed_rank_requeues_and_its_peers_error_does_not_speak_first(
    notes: EndNotes, asked: Path
) -> None:
    notes.tell(1, FAILED)  # an echo that is not known as one
    settle(notes, -9, rank=0)
    assert asked.read_text().split() == ["requeue", "7"]
    assert notes.has("requeued")
    settle(notes, FAILED, rank=1)  # ends the step, after that


@pytest.mark.parametrize(
    ("status", "log"),
    [
        (DEVICE, ""),
        (-6, "Process group watchdog thread terminated with exception: CUDA error: uncorrectable ECC error"),
    ],
)
def test_a_failed_device_takes_its_node_out_of_the_job(
    notes: EndNotes, asked: Path, status: int, log: str
) -> None:
    notes.tell(1, DEVICE, node="n1")  # two at a time
    settle(notes, status, rank=2, num_ranks=8, log=log)
    assert asked.read_text().splitlines() == [
        "requeue 7",
        "show --oneliner job 7",
        "update JobId=7 ExcNodeList=n9,n1,n2",
    ]


def test_an_abort_over_a_bug_on_the_device_is_a_bug(notes: EndNotes, asked: Path) -> None:
    said = "Process group watchdog thread terminated with exception: CUDA error: device-side assert triggered"
    settle(notes, -6, rank=2, log=said)
    assert notes.statuses() == {2: FAILED}
    assert notes.has("failed")
    assert not asked.exists()


def test_the_local_launcher_lets_an_aborted_victim_speak_last() -> None:
    order = sorted([LOST, -6, FAILED, BAD_INPUT, DEVICE, HUNG], key=local._rank_of)
    assert set(order[:2]) == {DEVICE, HUNG}
    assert order[2:4] == [BAD_INPUT, FAILED]


# ---- how soon it is gone


def test_a_departure_that_nobody_armed_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    departure = Departure(seconds=0.0)
    departure.arm()
    departure.note(RuntimeError("x"))
    assert not departure.is_armed
    time.sleep(0.1)


_LEAVING = """
import sys, threading, time
from selfmask_dist.runs.ending.leaving import Departure
departure = Departure(seconds=2.0)
departure.arm()
def work(seconds):
    time.sleep(seconds)
    print("written", flush=True)
threading.Thread(target=work, args=(float(sys.argv[1]),)).start()
error = KeyError("the reason")
departure.note(error)
departure.tell(error)
departure.leave(1)
"""


@pytest.mark.parametrize(("seconds", "is_written"), [("0.5", True), ("60", False)])
def test_a_checkpoint_that_is_being_written_has_seconds_and_no_more(seconds: str, is_written: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _LEAVING, seconds],
        env=child_environment(WORLD_SIZE="2", RANK="1"),
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 1
    assert ("written" in done.stdout) == is_written
    assert done.stderr.strip() == "KeyError: 'the reason'"


@pytest.mark.parametrize(("error", "is_noted"), [(KeyError("x"), True), (ArithmeticError("NaN"), False)])
def test_a_trial_that_diverged_is_no_end_of_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, is_noted: bool
) -> None:
    noted: list[BaseException] = []
    monkeypatch.setattr("selfmask_dist.runs.context.departure.note", noted.append)
    with (
        pytest.raises(type(error)),
        open_run(load_config(None, []), tmp_path, World(), StopRequest()),
    ):
        raise error
    assert bool(noted) == is_noted


@pytest.mark.parametrize(
    ("error", "status", "last"),
    [
        (BUG, FAILED, "RuntimeError: planted: the shapes do not match"),
        pytest.param(
            DEVICE_FAULT,
            DEVICE,
            "rank 2: this process's device failed, to be started again: CUDA error",
            marks=pytest.mark.slow,
        ),
    ],
)
@pytest.mark.distributed
def test_one_rank_of_four_fails_and_all_are_gone_with_their_reasons(
    tmp_path: Path, error: str, status: int, last: str
) -> None:
    path = write_config(
        tmp_path / "tiny.yaml", write_tiny_data(tmp_path / "data"), train={"global_batch_size": 12}
    )
    config = load_config(path, ["launch.processes_per_node=4", "run.name=a"])
    notes = EndNotes(tmp_path / "ends")
    extra = {"PYTHONPATH": plant(tmp_path / "plant", error, rank=2), FOLDER_VARIABLE: str(notes.folder)}
    arguments = [f"--config={path}", "run.name=a"]
    planned = local.plan_processes(config, num_nodes=1, train_arguments=arguments, environment=extra)
    logs = [tmp_path / f"rank-{process.rank}.log" for process in planned]
    children = []
    for process, log in zip(planned, logs, strict=True):
        with open(log, "wb") as stream:
            environment = child_environment(**process.environment)
            children.append(subprocess.Popen(process.argv, env=environment, stdout=stream, stderr=stream))
    statuses = [child.wait(timeout=120) for child in children]
    gone = time.time()
    said = [log.read_text() for log in logs]
    assert statuses == [LOST, LOST, status, LOST], "\n".join(said)
    assert notes.statuses() == dict(enumerate(statuses))
    planted = float(said[2].partition("planted ")[2].split()[0])
    assert gone - planted < 20
    lines = said[2].strip().splitlines()
    assert any(line.startswith(last) for line in (lines[-1], lines[-2])), said[2]
    assert "Traceback (most recent call last)" in said[2]
    assert said[2].count("Traceback") == 1
    if status == DEVICE:
        assert notes.nodes(DEVICE)
