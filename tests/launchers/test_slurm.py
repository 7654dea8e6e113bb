"""Runs on a real SLURM of four virtual nodes; see `tests.support.slurm`."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from selfmask_dist.cli.train import run as run_here
from selfmask_dist.config import load_config
from selfmask_dist.runs.ending.notes import EndNotes
from selfmask_dist.runs.exit_status import DEVICE
from selfmask_dist.runs.owner import FREE_AFTER_SECONDS
from tests.support import slurm
from tests.support.distributed import run_distributed
from tests.support.planted import BUG, DEVICE_FAULT, plant
from tests.support.tiny_run import (
    events_of,
    processes_of,
    rank_process,
    result_of,
    steps_of,
    submit,
    wait_until,
    write_config,
    write_tiny_data,
)

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="session")
def cluster() -> Iterator[Path]:
    """SLURM_CONF of the running cluster: the one that `make slurm-up` started, or its own."""
    if reason := slurm.why_not():
        pytest.skip(reason)
    was_up = slurm.is_up()
    yield slurm.up()
    if not was_up:
        slurm.down()


@pytest.fixture
def config_path(tmp_path: Path, cluster: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SLURM_CONF", str(cluster))
    return write_config(tmp_path / "tiny.yaml", write_tiny_data(tmp_path / "data"))


def logs_of(run: Path) -> str:
    texts = [path.read_text() for folder in ("logs", "slurm") for path in (run / folder).glob("*.*g")]
    return "\n".join([*texts, *(path.read_text() for path in (run / "slurm").glob("*_log.*"))])


def test_two_seeds_are_the_tasks_of_one_array(config_path: Path, tmp_path: Path) -> None:
    done = submit(config_path, "--wait", "--seeds=0,1", "--array", nodes=1, cluster="slurm")
    runs = [tmp_path / f"run-seed{seed}" for seed in (0, 1)]
    assert done.returncode == 0, done.stderr + done.stdout + "".join(logs_of(run) for run in runs)
    assert done.stdout.count("COMPLETED") == 2
    job = slurm.submitted_job(done.stdout)
    for seed, run in enumerate(runs):
        assert f"submitted job {job}_{seed} ({run.name})" in done.stdout
        assert result_of(run)["steps"] == 8
        assert load_config(run / "config.yaml").seed == seed
        assert f"of job {job}_{seed}" in (run / "logs" / "rank-0.log").read_text()
    assert (runs[0] / "final.mask").read_bytes() != (runs[1] / "final.mask").read_bytes()


def test_a_user_error_ends_the_job_and_is_not_requeued(config_path: Path, tmp_path: Path) -> None:
    done = submit(config_path, "--wait", "backbone.name=timm:no_such_model", nodes=1, cluster="slurm")
    assert done.returncode == 1
    assert "FAILED" in done.stdout
    assert "no_such_model" in logs_of(tmp_path / "run")


def test_a_preempted_job_is_requeued_and_ends_as_if_nothing_had_been(
    config_path: Path, tmp_path: Path
) -> None:
    storm = ["launch.exclusive=true", "train.epochs=60", "optim.score_lr=300", "engine.workers=1"]
    run_distributed(_run_rank, 2, str(config_path), [*storm, "run.name=calm"], backend="", timeout=120)
    done = submit(config_path, *storm, "run.name=stormy", nodes=2, cluster="slurm")
    assert done.returncode == 0, done.stderr
    job = slurm.submitted_job(done.stdout)
    run = tmp_path / "stormy"
    wait_until(lambda: len(steps_of(run)) > 20)
    slurm.preempt(job)
    slurm.wait_for_end(job)
    assert (run / "result.json").exists(), logs_of(run)
    kinds = [event["event"] for event in events_of(run) if event["event"] != "checkpoint"]
    assert kinds == ["start", "preempted", "start", "resume", "end"], logs_of(run)
    assert (run / "final.mask").read_bytes() == (tmp_path / "calm" / "final.mask").read_bytes()
    assert steps_of(run) == steps_of(tmp_path / "calm")


@pytest.mark.slow  # quick: the test above on SLURM, and what each of them restores without it
@pytest.mark.parametrize(
    ("method", "stopped_in", "file"),
    [("topk", "", "final.mask"), ("packnet", "task-2-train", "packed.safetensors")],
)
def test_a_ranking_family_and_a_chain_of_trainings_are_preempted_and_end_as_if_nothing_had_been(
    method: str, stopped_in: str, file: str, config_path: Path, tmp_path: Path
) -> None:
    """PackNet is stopped in its second task."""
    common = ["launch.exclusive=true", "train.global_batch_size=4", "run.log_every=4"]
    ranked = ["mask.family=topk", "mask.keep=0.6", "mask.keep_schedule=cubic", "mask.init=magnitude"]
    own = {
        "topk": [*ranked, "optim.score_lr=300", "train.epochs=30"],
        "packnet": ["method=packnet", "procedure.tasks=2", "optim.weight_lr=0.05", "train.epochs=90"],
    }[method]
    folder, calm = tmp_path / "stormy", tmp_path / "calm"
    done = submit(config_path, *common, *own, "run.name=stormy", nodes=2, cluster="slurm")
    assert done.returncode == 0, done.stderr
    job = slurm.submitted_job(done.stdout)
    wait_until(lambda: steps_of(folder / stopped_in))
    slurm.preempt(job)
    assert slurm.wait_for_end(job) == "COMPLETED", logs_of(folder)
    overrides = [*common, *own, "run.name=calm"]
    run_distributed(_run_rank, 2, str(config_path), overrides, backend="", timeout=120)
    assert (folder / file).read_bytes() == (calm / file).read_bytes()
    parts = [path.parent.relative_to(folder) for path in folder.rglob("metrics.jsonl")]
    events = [event["event"] for part in parts for event in events_of(folder / part)]
    assert "preempted" in events, logs_of(folder)
    for part in parts:
        assert steps_of(folder / part) == steps_of(calm / part), "no step done twice, none left out"


def _run_rank(config_path: str, overrides: list[str]) -> None:
    run_here(load_config(config_path, overrides))


@pytest.mark.slow  # quick: the watchdog in tests/runs/test_preempt.py, the requeue in test_chain.py
def test_a_hung_rank_is_noticed_dumped_and_requeued(config_path: Path, tmp_path: Path) -> None:
    hang = 3.0
    storm = [
        "run.name=hung",
        "train.epochs=40",
        "checkpoint.every_steps=5",
        f"checkpoint.hang_minutes={hang / 60}",
    ]
    done = submit(config_path, *storm, nodes=2, cluster="slurm")
    assert done.returncode == 0, done.stderr
    job, run = slurm.submitted_job(done.stdout), tmp_path / "hung"
    wait_until(lambda: len(steps_of(run)) > 10)
    os.kill(rank_process(tmp_path, 1, "hung"), signal.SIGSTOP)
    stopped = time.monotonic()
    wait_until(lambda: slurm.job_state(job) not in ("RUNNING", "COMPLETING"))
    # its time, the watchdog's interval, the wait for the peers' stacks, SLURM's own
    assert time.monotonic() - stopped < hang + 2 + 5 + 10, logs_of(run)
    slurm.start_again(job)
    assert "trainer.py" in (run / "stacks" / "rank-0.txt").read_text()
    # SLURM wakes the stopped process as it ends it: its watchdog, the task's abort, or the error it wakes to
    # (a peer is gone) shows where it was
    own = run / "stacks" / "rank-1.txt"
    shown = own.read_text() if own.exists() else (run / "logs" / "rank-1.log").read_text()
    assert "most recent call" in shown, logs_of(run)
    assert slurm.wait_for_end(job) == "COMPLETED", logs_of(run)
    assert steps_of(run) == list(range(1, 161))


def planted(path: str) -> list[str]:
    """Return the keys of a job whose processes read PYTHONPATH `path`, and not a snapshot of the code."""
    return ["launch.exclusive=true", "launch.snapshot=false", f"launch.environment={{PYTHONPATH: '{path}'}}"]


@pytest.mark.slow
def test_a_failed_device_takes_its_node_out_and_the_run_ends_elsewhere(
    config_path: Path, tmp_path: Path
) -> None:
    path = plant(tmp_path / "plant", DEVICE_FAULT, rank=1, step=12, once=True)
    keys = ["run.name=a", "train.epochs=10", "checkpoint.every_steps=5", *planted(path)]
    done = submit(config_path, *keys, nodes=2, cluster="slurm")
    assert done.returncode == 0, done.stderr
    job, run = slurm.submitted_job(done.stdout), tmp_path / "a"
    wait_until(lambda: slurm.job_state(job) == "PENDING" and steps_of(run))
    slurm.start_again(job)
    assert slurm.wait_for_end(job) == "COMPLETED", logs_of(run)
    excluded = slurm.job_field(job, "ExcNodeList")
    assert f"job {job} no longer runs on {excluded}, whose device failed" in logs_of(run)
    assert "rank 1: this process's device failed" in (run / "logs" / "rank-1.log").read_text()
    assert excluded not in slurm.job_field(job, "NodeList")
    assert excluded == ",".join(EndNotes(run / "logs" / f".ends-{job}-0").nodes(DEVICE))
    assert slurm.job_field(job, "Restarts") == "1"
    assert steps_of(run) == list(range(1, 41)), "no step twice, none left out"


@pytest.mark.slow
def test_a_bug_on_one_rank_is_not_requeued_and_all_processes_are_gone(
    config_path: Path, tmp_path: Path
) -> None:
    path = plant(tmp_path / "plant", BUG, rank=2, step=12)
    keys = ["run.name=a", "train.epochs=100000", "checkpoint.every_steps=5", *planted(path)]
    done = submit(config_path, *keys, nodes=4, cluster="slurm")
    assert done.returncode == 0, done.stderr
    job, run = slurm.submitted_job(done.stdout), tmp_path / "a"
    log = run / "logs" / "rank-2.log"
    wait_until(lambda: len(_training_processes(job)) == 4)
    wait_until(lambda: log.exists() and "planted " in log.read_text())
    wait_until(lambda: not _training_processes(job))
    began = float(log.read_text().partition("planted ")[2].split()[0])
    seconds = time.time() - began
    print(f"all processes were gone {seconds:.1f} s after the bug")
    assert seconds < 20, logs_of(run)
    assert log.read_text().strip().splitlines()[-1] == "RuntimeError: planted: the shapes do not match"
    assert slurm.wait_for_end(job) == "FAILED", logs_of(run)
    assert slurm.job_field(job, "Restarts") == "0"


def _training_processes(job: str) -> list[int]:
    """Return the living training processes of a job."""
    found = []
    for pid, command in processes_of(Path("selfmask_dist.cli")).items():
        try:
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"SLURM_JOB_ID={job}".encode() in variables and " train " in command:
            found.append(pid)
    return found


@pytest.mark.slow
def test_a_job_asks_for_the_gpus_and_cpus_that_the_nodes_have(
    cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing says a word of them; the job is held, so that it is only asked for."""
    monkeypatch.setenv("SLURM_CONF", str(cluster))
    data = write_tiny_data(tmp_path / "data")
    site = tmp_path / "site.yaml"
    shards = Path(data["train"]).parent
    site.write_text(
        f"run: {{dir: {tmp_path}}}\nsite:\n  data: {{inat21: {shards}}}\nlaunch: {{sbatch: {{hold: true}}}}\n"
    )
    monkeypatch.setenv("SELFMASK_SITE", str(site))
    config = Path(__file__).resolve().parents[2] / "configs" / "cascade_vitb32.yaml"
    done = submit(config, nodes=4, cluster="slurm")
    assert done.returncode == 0, done.stderr
    job = slurm.submitted_job(done.stdout)
    try:
        fields = {
            name: slurm.job_field(job, name) for name in ("TresPerNode", "NumTasks", "CPUs/Task", "NumNodes")
        }
    finally:
        slurm.cancel(job)
    assert fields["TresPerNode"].endswith(f"gpu:{slurm.GPUS}"), fields
    num_nodes = fields["NumNodes"].partition("-")[0]  # 4-4 while it waits
    assert (num_nodes, fields["NumTasks"]) == ("4", str(4 * slurm.GPUS)), "a process for each GPU"
    assert fields["CPUs/Task"] == "9", "eight workers and the process itself"


def test_a_cancelled_job_saves_and_is_not_requeued(config_path: Path, tmp_path: Path) -> None:
    done = submit(config_path, "train.epochs=100000", nodes=1, cluster="slurm")
    assert done.returncode == 0, done.stderr
    job, run = slurm.submitted_job(done.stdout), tmp_path / "run"
    wait_until(lambda: len(steps_of(run)) > 5)
    slurm.cancel(job)
    assert slurm.wait_for_end(job) == "CANCELLED"
    last = events_of(run)[-1]
    assert (last["event"], last["reason"]) == ("preempted", "SIGTERM"), logs_of(run)
    assert f"step-{last['step']:09d}" == (run / "checkpoints" / "latest").read_text().strip()


# a process-id namespace of its own: to who asks elsewhere, its processes are those of another machine
APART = "launch.container=[unshare, --pid, --fork, --kill-child, --mount-proc]"


@pytest.mark.slow
@pytest.mark.parametrize("where", ["on one machine", "on another machine"])
def test_a_second_job_on_a_living_run_is_refused_and_takes_a_killed_one_over(
    where: str, config_path: Path, tmp_path: Path
) -> None:
    keys = ["run.name=a", "train.epochs=100000", "checkpoint.every_steps=5", "eval.final=false"]
    apart = [APART] if where == "on another machine" else []
    first = submit(config_path, *keys, *apart, nodes=1, cluster="slurm")
    assert first.returncode == 0, first.stderr
    job, run = slurm.submitted_job(first.stdout), tmp_path / "a"
    wait_until(lambda: (run / "checkpoints" / "latest").exists())

    launched = submit(config_path, *keys, "run.resume=true", nodes=1, cluster="slurm")
    assert launched.returncode == 2
    assert f"{run} is being trained by process" in launched.stderr
    assert f"SLURM job {job}" in launched.stderr
    command = [sys.executable, "-m", "selfmask_dist.cli", "train", f"--config={config_path}", *keys]
    output = tmp_path / "second.out"
    second = slurm.sbatch(shlex.join([*command, "run.resume=true"]), output, "--nodes=1", "--no-requeue")
    assert slurm.wait_for_end(second) == "FAILED", logs_of(run)  # a job, past the launcher
    assert f"SLURM job {job}" in output.read_text()
    steps = len(steps_of(run))
    wait_until(lambda: len(steps_of(run)) > steps)  # the first goes on as if nothing had been
    assert slurm.job_state(job) == "RUNNING"

    slurm.kill(job)
    killed = time.monotonic()
    slurm.wait_for_end(job)
    assert [event["event"] for event in events_of(run)].count("preempted") == 0, "it had time to say so"
    while (again := submit(config_path, *keys, "run.resume=true", nodes=1, cluster="slurm")).returncode:
        assert f"SLURM job {job}" in again.stderr
        assert time.monotonic() - killed < FREE_AFTER_SECONDS + 30, again.stderr
    free = time.monotonic() - killed
    wait_until(lambda: any(event["event"] == "resume" for event in events_of(run)))
    print(f"{where}: free {free:.1f} s after the kill, resumed {time.monotonic() - killed:.1f} s after it")
    # 30 s: what a launcher takes to look on a machine that is busy; the heartbeat was up to 5 s old
    earliest, latest = (FREE_AFTER_SECONDS - 10, FREE_AFTER_SECONDS + 30) if apart else (0.0, 30.0)
    assert earliest < free < latest
    last = slurm.submitted_job(again.stdout)
    slurm.cancel(last)
    assert slurm.wait_for_end(last) == "CANCELLED"
    done = steps_of(run)
    assert done == list(range(1, len(done) + 1)), "no step twice, none left out"
    assert not (run / "owner.json").exists()


def test_a_second_cluster_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        monkeypatch.setattr(slurm, "_CONTROL_PORT", port)
        with pytest.raises(RuntimeError, match=f"port {port} is taken, maybe by another cluster"):
            slurm._check_ports()


def test_the_cluster_really_has_four_nodes(cluster: Path) -> None:
    command = ["srun", "--nodes=4", "sh", "-c", "echo $SLURMD_NODENAME"]
    environment = {**os.environ, "SLURM_CONF": str(cluster)}
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
    assert sorted(shown.stdout.split()) == list(slurm.NODES)
