"""A chain of jobs where a job may not be requeued, with stand-ins for SLURM's commands."""

import os
from pathlib import Path

import pytest

from launchers import chain, requeue, slurm
from selfmask_dist.runs.ending.notes import EndNotes
from selfmask_dist.runs.exit_status import DEVICE, HUNG, LOST, REQUEUE
from selfmask_dist.runs.owner import Claim, RunHeldError, check_free
from selfmask_dist.runs.submitted import waiting_job


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's folder with what submitit wrote for job 7, on a cluster that forbids requeues."""
    programs, run = tmp_path / "bin", tmp_path / "run"
    programs.mkdir()
    (run / "slurm").mkdir(parents=True)
    (run / "logs").mkdir()
    (run / "slurm" / "7_submission.sh").write_text("#!/bin/bash\n")
    (run / "slurm" / "7_submitted.pkl").write_bytes(b"task")
    scripts = {
        "scontrol": f'echo "$@" >> {tmp_path}/scontrol; case $1 in requeue) echo forbidden >&2; exit 1;; '
        "*) echo ExcNodeList=n9;; esac",
        "squeue": 'case "$*" in *%i*) echo 8 PENDING;; *) echo RUNNING;; esac',
        "sbatch": f'echo "$@" >> {tmp_path}/sbatch; env > {tmp_path}/env; echo "8;cluster"',
    }
    for name, body in scripts.items():
        (programs / name).write_text(f"#!/bin/sh\n{body}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setattr(requeue.signal, "signal", lambda *_: None)  # pytest's own handlers stay
    for name in ("_PEER_SECONDS", "_LOST_SECONDS", "_DEVICE_SECONDS", "_END_SECONDS", "_DUMP_SECONDS"):
        monkeypatch.setattr(requeue, name, 0.2)
    monkeypatch.setattr(requeue, "_POLL_SECONDS", 0.02)
    return run


def _settle(run: Path, status: int, how: str, **more: str) -> None:
    environment = {**os.environ, "SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n0", "SLURM_PROCID": "0", **more}
    notes = EndNotes(run / "logs" / ".ends-7-0")
    end = requeue.Aftermath(
        environment,
        notes,
        run / "logs" / "rank-0.log",
        max_restarts=3,
        how=how,  # type: ignore[arg-type]
        submitted=run / "slurm",
    )
    end.settle(status, rank=0, num_ranks=1)


def test_a_job_that_slurm_has_requeued_by_itself_gets_no_second_one(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The grace time of a preemption was over before the processes had saved. The words are SLURM 22.05's."""
    program = run.parent / "bin" / "scontrol"
    program.write_text("#!/bin/sh\necho 'Job is pending execution for job 7' >&2\nexit 1\n")
    _settle(run, REQUEUE, "auto")
    assert not (run.parent / "sbatch").exists()
    assert "SLURM has requeued it by itself" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("how", "requeues", "chains"), [("auto", True, True), ("requeue", True, False), ("chain", False, True)]
)
def test_how_a_job_goes_on(run: Path, how: str, requeues: bool, chains: bool) -> None:
    _settle(run, REQUEUE, how)
    asked = run.parent / "scontrol"
    assert (asked.exists() and "requeue 7" in asked.read_text()) == requeues
    assert (run.parent / "sbatch").exists() == chains
    if not chains:
        return
    command = f"--parsable --dependency=afterany:7 --export=ALL {run}/slurm/7_submission.sh"
    assert (run.parent / "sbatch").read_text().strip() == command
    assert (run / "slurm" / "8_submitted.pkl").read_bytes() == b"task"  # where submitit looks for it
    passed = dict(line.split("=", 1) for line in (run.parent / "env").read_text().splitlines() if "=" in line)
    assert (passed["SELFMASK_CHAIN"], passed["SELFMASK_EARLIER_STARTS"]) == ("7", "1")
    assert not [name for name in passed if name.startswith("SLURM_") and name != "SLURM_CONF"]
    assert waiting_job(run) == "8"
    assert chain.next_job(run / "slurm", "7") == "8"


def test_a_job_that_slurm_started_again_has_its_next_one(run: Path) -> None:
    for _ in range(2):
        assert chain.submit_next(run / "slurm", {**os.environ, "SLURM_JOB_ID": "7"})
    assert len((run.parent / "sbatch").read_text().splitlines()) == 1


def test_a_hung_job_is_requeued_and_its_tasks_know_why(run: Path) -> None:
    """They then have their processes say where they are, in place of saving."""
    _settle(run, HUNG, "requeue")
    assert "requeue 7" in (run.parent / "scontrol").read_text()
    assert EndNotes(run / "logs" / ".ends-7-0").has(requeue.HUNG_NOTE)


def test_nodes_that_failed_stay_out_of_the_chain(run: Path) -> None:
    _settle(run, DEVICE, "chain")
    assert "--exclude=n9,n0" in (run.parent / "sbatch").read_text()


def test_failures_are_counted_over_the_chain(run: Path) -> None:
    more = {"SELFMASK_CHAIN": "5"}
    for step in range(4):
        (run / "checkpoints" / f"step-{step}").mkdir(parents=True)
        (run / "slurm" / f"{10 + step}_submission.sh").write_text("#!/bin/bash\n")
        (run / "slurm" / f"{10 + step}_submitted.pkl").write_bytes(b"task")
        _settle_job(run, str(10 + step), more)
    assert len((run.parent / "sbatch").read_text().splitlines()) == 3  # launch.max_restarts


def _settle_job(run: Path, job: str, more: dict[str, str]) -> None:
    environment = {**os.environ, "SLURM_JOB_ID": job, **more}
    notes = EndNotes(run / "logs" / f".ends-{job}-0")
    log = run / "logs" / "rank-0.log"
    requeue.Aftermath(environment, notes, log, 3, how="chain", submitted=run / "slurm").settle(
        LOST, rank=0, num_ranks=1
    )


def test_a_task_of_an_array_has_no_next_job(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    environment = {**os.environ, "SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "6"}
    assert not chain.submit_next(run / "slurm", environment)
    assert "a task of an array" in capsys.readouterr().err


def test_restarts_go_on_counting_in_the_next_job() -> None:
    place = {"SLURM_JOB_ID": "9", "SLURM_JOB_NODELIST": "n1", "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1"}
    place |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    more = {"SELFMASK_EARLIER_STARTS": "4", "SLURM_RESTART_COUNT": "1"}
    assert slurm.rank_environment({**place, **more})["SELFMASK_RESTARTS"] == "5"


def test_the_next_job_takes_over_what_a_killed_one_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def job(number: str, chain_id: str, restarts: str) -> None:
        monkeypatch.setenv("SLURM_JOB_ID", number)
        monkeypatch.setenv("SELFMASK_CHAIN", chain_id)
        monkeypatch.setenv("SELFMASK_RESTARTS", restarts)

    job("7", "7", "0")
    claim = Claim(tmp_path / "run")
    claim._record["machine"] = "another"  # whose processes are not seen from here
    claim._record["pid"] = 1
    claim._folder.mkdir()
    claim._write()
    job("9", "9", "1")
    with pytest.raises(RunHeldError):
        check_free(tmp_path / "run")
    job("8", "7", "1")
    check_free(tmp_path / "run")


def test_srun_options() -> None:
    options = {
        "container-image": "a.sqsh",
        "cpu_bind": "cores",
        "no-kill": True,
        "mpi": None,
        "x": ["a", "b"],
    }
    assert slurm.srun_options(options) == [
        "--container-image=a.sqsh",
        "--cpu-bind=cores",
        "--no-kill",
        "--x=a,b",
    ]
    assert slurm.srun_options(("--mpi=none",)) == ["--mpi=none"]
