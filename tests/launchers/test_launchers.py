"""Launchers: nothing starts that cannot work, runs really run on several nodes, nothing is left behind."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from launchers import local, slurm
from launchers.preflight import preflight
from launchers.snapshot import snapshot_environment, take_snapshot
from selfmask_dist.cli import main
from selfmask_dist.config import load_config
from selfmask_dist.runs.exit_status import DIVERGED, HUNG, LOST, REQUEUE, is_restartable
from tests.support.tiny_run import (
    child_environment,
    processes_of,
    result_of,
    submit,
    submit_command,
    wait_until,
    write_config,
    write_tiny_data,
)


@pytest.fixture(scope="module")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def config_path(tmp_path: Path, tiny_data: dict[str, str]) -> Path:
    return write_config(tmp_path / "tiny.yaml", tiny_data)


# ---- what is said before anything starts


def test_help_explains_options_and_where_keys_are_explained() -> None:
    command = [sys.executable, str(Path(local.__file__).parent / "submit.py"), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for expected in ("--nodes N", "--cluster {auto,slurm,local}", "`selfmask help`"):
        assert expected in shown


def test_a_dry_run_shows_every_process_and_starts_none(config_path: Path, tmp_path: Path) -> None:
    arguments = ("--dry-run", "launch.processes_per_node=2", "optim.score_lr=7")
    done = submit(config_path, *arguments, nodes=2)
    assert done.returncode == 0, done.stderr
    plan = r"^# timm:vit_tiny_patch16_224, .* on 2 x 2 GPUs"  # memory and bytes of each rank
    assert re.search(plan, done.stdout, re.MULTILINE)
    for engine in ("ddp", "fsdp", "bits", "deepspeed-3"):
        assert re.search(rf"^# {engine} +[\d. -]+$", done.stdout, re.MULTILINE), engine
    commands = [line for line in done.stdout.splitlines() if line.startswith("# ") and " train " in line]
    assert len(commands) == 4
    for rank, command in enumerate(commands):
        for part in (f"RANK={rank} ", "WORLD_SIZE=4", f"LOCAL_RANK={rank % 2} ", f"GROUP_RANK={rank // 2} "):
            assert part in command
        assert "optim.score_lr=7" in command
    assert "score_lr: 7" in done.stdout  # the resolved configuration
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


@pytest.mark.parametrize("cluster", ["local", "slurm"])
def test_a_run_for_each_config_and_seed(config_path: Path, tmp_path: Path, cluster: str) -> None:
    other = config_path.with_name("other.yaml")
    other.write_text(config_path.read_text())
    arguments = ("--dry-run", "--plan-seconds=0", f"--config={other}", "--seeds=3,4")
    done = submit(config_path, *arguments, nodes=1, cluster=cluster)
    assert done.returncode == 0, done.stderr
    names = re.findall(r"^  name: (run-.*)$", done.stdout, re.MULTILINE)
    assert names == ["run-tiny-seed3", "run-tiny-seed4", "run-other-seed3", "run-other-seed4"]
    assert re.findall(r"^seed: (\d)", done.stdout, re.MULTILINE) == ["3", "4", "3", "4"]
    if cluster == "slurm":
        assert re.findall(r"--job-name=(run-.*)", done.stdout) == names


def test_what_is_wrong_with_all_runs_is_said_once(config_path: Path, tmp_path: Path) -> None:
    (tmp_path / "run-seed1").mkdir()
    (tmp_path / "run-seed1" / "config.yaml").write_text("seed: 1\n")
    done = submit(config_path, "--seeds=0,1", "data.test=nowhere")
    assert done.returncode == 2
    first, second = done.stderr.splitlines()
    assert "no data set nowhere is found" in first
    assert "run-seed1 holds a run already" in second
    assert not (tmp_path / "run-seed0").exists()  # the one that could run did not start


def test_a_plan_that_cannot_be_made_is_no_error(config_path: Path) -> None:
    done = submit(config_path, "--dry-run", "--plan-seconds=0.01")
    assert done.returncode == 0, done.stderr
    assert "# no plan: `selfmask plan` took longer" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["optim.scor_lr=7"], "optim.score_lr"),
        (["train.epochs=many"], "train.epochs"),
        (["--seeds", "0,many"], "'0,many' is not numbers"),
        (["--seeds", "1,1"], "run-seed1; give each seed once"),
        (["--nodes", "0"], "'0' is not a number of nodes"),
        (["--nodes", "4:2"], "'4:2' is not a number of nodes, or a range such as 2:4"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--config", "cascade_vitb23"], "did you mean cascade_vitb32 or cascade_vitb32_swav?"),
        (["--train.epochs=3"], "write train.epochs=3, without the dashes"),
    ],
)
def test_a_mistake_is_named_and_nothing_starts(
    config_path: Path, tmp_path: Path, arguments: list[str], complaint: str
) -> None:
    done = submit(config_path, *arguments)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


def test_a_finished_run_is_not_touched(config_path: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("seed: 0\n")
    done = submit(config_path)
    assert done.returncode == 2
    assert "holds a run already" in done.stderr
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_more_processes_than_gpus_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    config = load_config(None, ["launch.processes_per_node=2"])
    with pytest.raises(ValueError, match=r"need a GPU each and there are 3"):
        local.plan_processes(config, num_nodes=2, train_arguments=[])


def test_gpus_are_shared_out_to_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    config = load_config(None, ["launch.processes_per_node=0"])
    processes = local.plan_processes(config, num_nodes=2, train_arguments=[])
    shares = [process.environment["CUDA_VISIBLE_DEVICES"] for process in processes]
    assert shares == ["4,5", "4,5", "6,7", "6,7"]
    assert [process.environment["LOCAL_RANK"] for process in processes] == ["0", "1", "0", "1"]


# ---- a real run


def test_two_nodes_train_to_a_result_from_a_snapshot(
    config_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = submit(config_path, "run.name=first", nodes=2)
    assert done.returncode == 0, done.stderr
    assert result_of(tmp_path / "first")["steps"] == 8
    assert "on 2 process(es)" in done.stderr
    assert main(["logs", str(tmp_path / "first"), "--rank", "1"]) == 0
    assert "start 0" in capsys.readouterr().out
    assert (tmp_path / "first" / "code" / "selfmask_dist" / "training" / "trainer.py").is_file()
    assert not processes_of(tmp_path)


@pytest.mark.slow
def test_two_seeds_run_one_after_the_other(config_path: Path, tmp_path: Path) -> None:
    done = submit(config_path, "--seeds=0,1", "train.epochs=1", nodes=1)
    assert done.returncode == 0, done.stderr
    losses = []
    for seed in (0, 1):
        run = tmp_path / f"run-seed{seed}"
        assert result_of(run)["steps"] == 4
        assert load_config(run / "config.yaml").seed == seed
        losses.append((run / "metrics.jsonl").read_text().splitlines()[0].partition("loss")[2])
    assert losses[0] != losses[1]


def test_the_snapshot_is_what_python_imports(tmp_path: Path) -> None:
    take_snapshot(tmp_path)
    code = "import selfmask_dist.config, launchers; print(selfmask_dist.config.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **snapshot_environment(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(local.__file__).parents[1],  # where the checkout would be found first
    )
    assert done.stdout.strip() == str(tmp_path / "code" / "selfmask_dist" / "config" / "__init__.py")


@pytest.mark.slow
def test_a_failing_rank_is_named_and_its_status_passed_on(tmp_path: Path, tiny_data: dict[str, str]) -> None:
    config = write_config(tmp_path / "tiny.yaml", tiny_data, optim={"head_lr": 1e30, "score_lr": 1e30})
    started = time.monotonic()
    done = submit(config, "objective.head_norm=none", "train.epochs=50")
    assert done.returncode == DIVERGED, done.stderr
    assert f"ended with status {DIVERGED}" in done.stderr
    assert time.monotonic() - started < local._STOP_SECONDS, "its peer is not waited for"
    assert not processes_of(tmp_path)


@pytest.mark.parametrize(
    "signum", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)], ids=["15", "2"]
)
def test_a_signal_to_the_launcher_stops_everything(
    config_path: Path, tmp_path: Path, signum: signal.Signals
) -> None:
    command = submit_command(config_path, "train.epochs=100000", "engine.workers=1")
    launcher = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=child_environment())
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.stat().st_size)
    assert len(processes_of(tmp_path)) >= 3
    launcher.send_signal(signum)
    assert launcher.wait(30) == 128 + signum
    wait_until(lambda: not processes_of(tmp_path), 5)


# ---- the local launcher alone, with processes that are no training


def fake(rank: int, code: str, **environment: str) -> local.Process:
    return local.Process(rank, rank, [sys.executable, "-c", code], environment)


def test_the_status_of_who_failed_first_wins_over_its_peers(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plan = [
        fake(0, "import sys; sys.exit(1)"),  # as a peer whose connection broke
        fake(1, "import sys; print('the reason'); sys.exit(2)"),
        fake(2, "import time; time.sleep(600)"),
    ]
    assert local.run_processes(lambda _: plan, logs=tmp_path) == 2
    shown = capfd.readouterr().err
    assert "rank 1 on node 1 ended with status 2" in shown
    assert "the reason" in shown


def test_who_does_not_stop_in_its_time_is_killed_and_that_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal that a group of processes got, and one of them passed on, is one signal, not the second."""
    deaf = fake(0, "import signal, time; signal.signal(15, lambda *_: print('heard')); time.sleep(600)")
    monkeypatch.setattr(local, "_STOP_SECONDS", 3.0)
    start = time.monotonic()
    for delay in (1.5, 1.8):
        threading.Timer(delay, os.kill, (os.getpid(), signal.SIGTERM)).start()
    assert local.run_processes(lambda _: [deaf], logs=tmp_path) == 128 + signal.SIGTERM
    assert time.monotonic() - start > 4.0
    assert not processes_of(tmp_path)


@pytest.mark.parametrize("end", [f"sys.exit({REQUEUE})", f"sys.exit({HUNG})", "os.kill(os.getpid(), 9)"])
def test_a_preempted_hung_or_killed_run_starts_again(tmp_path: Path, end: str) -> None:
    def plan(restart: int) -> list[local.Process]:
        code = f"import os, sys; {end}" if restart < 2 else "print('through')"
        return [fake(0, code), fake(1, "import time; time.sleep(0 if " + str(restart >= 2) + " else 600)")]

    local_grace, local._GRACE_SECONDS = local._GRACE_SECONDS, 0.2
    stop, local._STOP_SECONDS = local._STOP_SECONDS, 0.2
    try:
        assert local.run_processes(plan, logs=tmp_path, max_restarts=2) == 0
        if str(REQUEUE) in end:  # being told to stop is no failure
            assert local.run_processes(plan, logs=tmp_path, max_restarts=1) == 0
            assert local.run_processes(plan, logs=tmp_path, max_restarts=0) == REQUEUE
        else:
            assert local.run_processes(plan, logs=tmp_path, max_restarts=1) in (HUNG, 128 + 9)
    finally:
        local._GRACE_SECONDS, local._STOP_SECONDS = local_grace, stop
    assert "through" in local.log_path(tmp_path, 0).read_text()


def test_a_process_may_save_for_as_long_as_its_run_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large state takes longer to save than the launcher's own minute."""
    monkeypatch.setattr(local, "_STOP_SECONDS", 0.2)
    code = f"import sys, time; time.sleep(1); open({str(tmp_path / 'saved')!r}, 'w'); sys.exit({REQUEUE})"
    plan = [fake(0, f"import sys; sys.exit({REQUEUE})"), fake(1, code)]
    assert local.run_processes(lambda _: plan, logs=tmp_path, stop_seconds=20) == REQUEUE
    assert (tmp_path / "saved").exists()


def test_an_error_is_not_restarted(tmp_path: Path) -> None:
    restarts = []

    def plan(restart: int) -> list[local.Process]:
        restarts.append(restart)
        return [fake(0, "import sys; sys.exit(1)")]

    assert local.run_processes(plan, logs=tmp_path, max_restarts=5) == 1
    assert restarts == [0]


def test_restartable_statuses() -> None:
    assert all(is_restartable(status) for status in (REQUEUE, HUNG, LOST, -9, -15, 137))
    assert not any(is_restartable(status) for status in (0, 1, 2, 3, 127))


# ---- SLURM without SLURM


def test_the_batch_script_holds_what_was_asked_for(config_path: Path, tmp_path: Path) -> None:
    done = submit(
        config_path,
        *("--dry-run", "--plan-seconds=0"),
        *("launch.partition=gpu", "launch.account=vision", "launch.qos=long", "launch.constraint=a100"),
        *(
            "launch.hours=1.5",
            "launch.gpus_per_node=4",
            "launch.processes_per_node=0",
            "launch.exclusive=true",
        ),
        *("launch.cpus_per_process=6", "launch.memory_gb=100", "launch.mail=me@example.org"),
        *(
            "launch.environment={NCCL_DEBUG: INFO}",
            "launch.sbatch={nodelist: n1}",
            "launch.signal_seconds=120",
            "launch.srun={container-image: image.sqsh, cpu-bind: cores}",
        ),
        nodes=3,
        cluster="slurm",
    )
    assert done.returncode == 0, done.stderr
    for line in (
        *("--partition=gpu", "--account=vision", "--qos=long", "--constraint=a100", "--time=90", "--nodes=3"),
        *("--gpus-per-node=4", "--ntasks-per-node=4", "--exclusive", "--cpus-per-task=6", "--mem=100GB"),
        *("--mail-user=me@example.org", "--signal=USR2@120", "--nodelist=n1", "--requeue", "--job-name=run"),
    ):
        assert f"#SBATCH {line}" in done.stdout.splitlines(), line
    assert "export NCCL_DEBUG=INFO" in done.stdout
    assert "export TORCH_FR_BUFFER_SIZE=2000" in done.stdout
    assert f"TORCH_FR_DUMP_TEMP_FILE={tmp_path / 'run' / 'stacks'}/nccl-rank-" in done.stdout
    started = next(line for line in done.stdout.splitlines() if line.startswith("srun "))
    assert " --container-image=image.sqsh --cpu-bind=cores " in started
    assert f"PYTHONPATH={tmp_path / 'run' / 'code'}" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


def test_a_job_takes_as_many_nodes_as_it_gets(config_path: Path) -> None:
    options = ("--dry-run", "--plan-seconds=0", "--nodes", "2:3", "launch.processes_per_node=2")
    done = submit(config_path, *options, cluster="slurm")  # batches of 12 on 4 and 6 processes
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --nodes=2-3" in done.stdout.splitlines()
    (tasks,) = re.findall(r"^export SLURM_NTASKS=.*$", done.stdout, re.MULTILINE)
    counted = subprocess.run(
        ["bash", "-c", f"SLURM_JOB_NUM_NODES=3 SLURM_NTASKS=4; {tasks}; echo $SLURM_NTASKS"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert counted.stdout.strip() == "6"
    # a number of tasks would be counted on the least number of nodes, and SLURM would give no more
    assert "ntasks" not in done.stdout
    assert "#SBATCH --cpus-per-task=2" in done.stdout.splitlines()
    assert " --cpus-per-task=1 " in done.stdout.partition("\nsrun ")[2]
    done = submit(config_path, *options, "train.global_batch_size=8", cluster="slurm")
    assert done.returncode == 2
    assert "global batch 8 is not divisible by 6 processes" in done.stderr
    assert "by 4 processes" not in done.stderr
    done = submit(config_path, *options)
    assert done.returncode == 2
    assert "--nodes 2:3 is for SLURM" in done.stderr


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(("most", "per_node", "batch"), [(4, 2, 48), (3, 1, 36), (4, 8, 768)])
def test_fewer_nodes_hold_no_more_images_at_once(
    accumulate: int, most: int, per_node: int, batch: int
) -> None:
    largest = -(-(batch // (most * per_node)) // accumulate)
    for nodes in range(1, most + 1):
        images = batch // (nodes * per_node)
        steps = slurm.micro_steps_on(nodes, accumulate, most)
        assert steps <= images
        assert -(-images // steps) <= largest, (nodes, steps)
    assert slurm.micro_steps_on(most, accumulate, most) == accumulate


def test_a_task_says_how_many_micro_steps_its_nodes_take() -> None:
    task = slurm.TrainTask((), Path("logs"), accumulate_on_most=(2, 4))
    assert task._micro_steps({"WORLD_SIZE": "24", "LOCAL_WORLD_SIZE": "8"}) == ["train.accumulate=3"]
    assert slurm.TrainTask((), Path("logs"))._micro_steps({}) == []


def test_a_cascade_as_three_jobs_with_its_experts_as_an_array(config_path: Path, tmp_path: Path) -> None:
    cascade = ["method=cascade", "objective.name=swav", "cascade.clusters=[2, 4]", "cascade.components=4"]
    options = ["--dry-run", "--plan-seconds=0", "--experts-array"]
    done = submit(config_path, *options, *cascade, "launch.sbatch={dependency: singleton}", cluster="slurm")
    assert done.returncode == 0, done.stderr
    first, experts, last = done.stdout.split("#!/bin/bash")[1:]
    assert "#SBATCH --dependency=singleton" in first
    assert "--array" not in first + last
    assert "#SBATCH --array=0-3%4" in experts, "as many as the router may find"
    for script in (experts, last):
        assert "#SBATCH --dependency='afterok:<the job before>'" in script
        assert "#SBATCH --kill-on-invalid-dep=yes" in script
    config = load_config(config_path, cascade)
    jobs = slurm.jobs_of(config, experts_array=True)
    assert [job.parts for job in jobs] == [
        ("router",),
        ("expert-0", "expert-1", "expert-2", "expert-3"),
        ("combination",),
    ]
    assert jobs[1].folders[3] == tmp_path / "run" / "expert-3", "tasks at the same time log apart"
    for wrong, cluster, message in (
        (cascade, "local", "--experts-array makes SLURM jobs"),
        ([], "slurm", "--experts-array is for method=cascade, and method is mask"),
    ):
        done = submit(config_path, *options, *wrong, cluster=cluster)
        assert done.returncode == 2
        assert message in done.stderr


def test_a_task_of_an_array_is_requeued_by_its_own_name() -> None:
    array = {"SLURM_JOB_ID": "70", "SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "3"}
    assert slurm.own_job_id(array) == "70_3", "70 alone would be all tasks"
    assert slurm.own_job_id({"SLURM_JOB_ID": "71"}) == "71"


def test_what_is_false_in_launch_sbatch_is_left_out(config_path: Path) -> None:
    keys = ["launch.sbatch={requeue: false, hold: true, nice: null, nodelist: n1}"]
    lines = submit(config_path, "--dry-run", "--plan-seconds=0", *keys, cluster="slurm").stdout.splitlines()
    assert {"#SBATCH --no-requeue", "#SBATCH --hold", "#SBATCH --nodelist=n1"} <= set(lines)
    assert not [line for line in lines if line.startswith(("#SBATCH --requeue", "#SBATCH --nice"))]


def test_the_default_time_limit_is_not_submitits_five_minutes(config_path: Path) -> None:
    done = submit(config_path, "--dry-run", "--plan-seconds=0", cluster="slurm")
    assert "#SBATCH --time=1440" in done.stdout


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n[1-4]", "n1"),
        ("gpu[03-05,9],login1", "gpu03"),
        ("a,b", "a"),
        ("rack[2-3]n[07,9]-ib,x", "rack2n07-ib"),
        ("node-1-2,node-1-3", "node-1-2"),
    ],
)
def test_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert slurm.first_host(nodes) == first


def test_rank_and_rendezvous_come_from_the_jobs_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # no scontrol
    environment = {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_NTASKS": "4",
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "1",
    }
    first = slurm.rank_environment(environment)
    assert (first["RANK"], first["WORLD_SIZE"]) == ("3", "4")
    assert (first["LOCAL_RANK"], first["LOCAL_WORLD_SIZE"], first["GROUP_RANK"]) == ("1", "2", "1")
    assert (first["MASTER_ADDR"], first["SELFMASK_RESTARTS"]) == ("n1", "0")
    again = slurm.rank_environment({**environment, "SLURM_RESTART_COUNT": "1"})
    assert again["MASTER_PORT"] != first["MASTER_PORT"]  # the earlier start may still hold its port
    assert 20_000 <= int(first["MASTER_PORT"]) < 32_000


def test_preflight_of_a_good_configuration_is_silent(config_path: Path) -> None:
    preflight(load_config(config_path), cluster="local", num_nodes=2)
