"""Runs under torchrun, as docs/kubernetes.md starts them, and the files of that page."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from selfmask_dist.runs.exit_status import BAD_INPUT, DIVERGED, FAILED
from tests.support.tiny_run import (
    ROOT,
    child_environment,
    events_of,
    rank_process,
    result_of,
    wait_until,
    write_config,
    write_tiny_data,
)

PAGE = (ROOT / "docs" / "kubernetes.md").read_text()
FOLDERS = ("selfmask_dist", "launchers", "data_prep", "configs")
LOCAL = ["--standalone", "--nproc-per-node", "2"]


def torchrun(config: Path, *arguments: str, options: tuple[str, ...] = ()) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", *LOCAL, *options, "-m", "selfmask_dist.cli"]
    return [*command, "train", "--config", str(config), *arguments]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("torchrun")
    checkpoint = {"every_steps": 2, "keep_last": 2}
    return write_config(folder / "tiny.yaml", write_tiny_data(folder / "data"), checkpoint=checkpoint)


@pytest.mark.distributed
def test_torchrun_makes_a_run_and_says_why_one_failed(config: Path) -> None:
    variables = child_environment(SELFMASK_SITE="none")
    done = subprocess.run(
        torchrun(config, "run.name=a"),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=variables,
    )
    assert done.returncode == 0, done.stderr
    assert result_of(config.parent / "a")["steps"] == 8
    done = subprocess.run(
        torchrun(config, "run.name=a"),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=variables,
    )
    assert done.returncode == 1  # torchrun's own, whatever a process ended with
    assert "a holds a run already" in done.stderr
    assert re.search(rf"exitcode\s*: {BAD_INPUT}\b", done.stderr)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_killed_process_is_started_again_and_the_masks_are_the_same(config: Path) -> None:
    longer = "train.epochs=12"
    variables = child_environment(SELFMASK_SITE="none")
    subprocess.run(torchrun(config, "run.name=quiet", longer), check=True, timeout=200, env=variables)
    run = config.parent / "killed"
    command = torchrun(config, "run.name=killed", longer, options=("--max-restarts", "1"))
    with subprocess.Popen(command, env=variables) as process:
        wait_until(lambda: (run / "checkpoints" / "latest").exists())
        os.kill(rank_process(config.parent, 1, "killed"), signal.SIGKILL)
        assert process.wait(200) == 0
    starts = [event for event in events_of(run) if event["event"] in ("start", "resume")]
    assert len(starts) > 1, starts
    assert (run / "final.mask").read_bytes() == (config.parent / "quiet" / "final.mask").read_bytes()


# ---- the page


def _blocks(word: str) -> list[str]:
    found = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    return [block for block in found if word in block]


@pytest.fixture(scope="module")
def jobset() -> Any:
    (block,) = _blocks("kind: JobSet")
    return YAML(typ="safe").load(block)


def test_the_jobset_restarts_what_passes_and_ends_what_does_not(jobset: Any) -> None:
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["completionMode"] == "Indexed"
    assert job["parallelism"] == job["completions"]
    assert job["backoffLimit"] == 0  # one pod alone never comes back: all ranks start together
    (rule,) = job["podFailurePolicy"]["rules"]
    assert set(rule["onExitCodes"]["values"]) == {FAILED, BAD_INPUT, DIVERGED}
    assert (rule["action"], rule["onExitCodes"]["operator"]) == ("FailJob", "In")
    (policy,) = jobset["spec"]["failurePolicy"]["rules"]
    assert policy["action"] == "FailJobSet"
    assert policy["onJobFailureReasons"] == ["PodFailurePolicy"]
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"


def test_the_jobset_gives_every_variable_of_a_process_group(jobset: Any) -> None:
    job = jobset["spec"]["replicatedJobs"][0]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    variables = {entry["name"]: entry for entry in container["env"]}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        assert name in variables, name
    assert variables["WORLD_SIZE"]["value"] == str(job["template"]["spec"]["completions"])
    host = f"{jobset['metadata']['name']}-{job['name']}-0-0.{jobset['metadata']['name']}"
    assert variables["MASTER_ADDR"]["value"] == host
    label = variables["SELFMASK_RESTARTS"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert label == "metadata.labels['jobset.sigs.k8s.io/restart-attempt']"
    assert "SELFMASK_CHAIN" in variables


def test_the_recipes_are_of_one_image() -> None:
    folder = ROOT / "launchers" / "container"
    docker, apptainer = (folder / "Dockerfile").read_text(), (folder / "selfmask.def").read_text()
    (base,) = re.findall(r"^FROM (\S+)$", docker, re.MULTILINE)
    assert re.findall(r"^From: (\S+)$", apptainer, re.MULTILINE) == [base]
    for text in (docker, apptainer):
        assert "://" not in text  # no addresses: the base image's name is all
        for path in (
            "pyproject.toml",
            "README.md",
            "LICENSE",
            "selfmask_dist",
            "launchers",
            "data_prep",
            "configs",
        ):
            assert re.search(rf"\b{re.escape(path)}\b", text), path  # what the package is built from
            assert (ROOT / path).exists()
