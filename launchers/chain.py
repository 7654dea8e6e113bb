"""A run as a chain of jobs, where a job may not be requeued: each submits the next before it ends.

    job 12 saved -> sbatch --dependency=afterany:12 (the script of job 12) -> job 13 goes on

The next job runs the same batch script with the same task. By two variables it knows that it goes on with a
run: the chain's first job, for which failures are counted and the run's folder is free, and how many starts
there were before. Knows nothing of training.
"""

import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from selfmask_dist.runs.owner import CHAIN_VARIABLE
from selfmask_dist.runs.submitted import note_jobs, waiting_job

STARTS_VARIABLE = "SELFMASK_EARLIER_STARTS"  # of the jobs of a chain before this one
_SECONDS = 60.0  # for sbatch to answer
# of this task or step, which would bend what sbatch makes of the script, or what the next job's srun does
_OWN_PREFIXES = ("SLURM_", "SRUN_", "PMI", "SUBMITIT_")
_KEPT = ("SLURM_CONF",)


def restarts_of(environment: Mapping[str, str]) -> int:
    """Return how often the run was started before, by this job and those before it in its chain."""
    return int(environment.get(STARTS_VARIABLE, 0)) + int(environment.get("SLURM_RESTART_COUNT", 0))


def chain_of(environment: Mapping[str, str]) -> str:
    """Return the first job of the chain that this job belongs to: itself where there is none before."""
    return environment.get(CHAIN_VARIABLE) or environment["SLURM_JOB_ID"]


def submit_next(folder: Path, environment: Mapping[str, str], without_nodes: Sequence[str] = ()) -> bool:
    """Submit the job that goes on when this one has ended, and return whether there is one.

    Once for each job: one that SLURM itself started again, after a node's failure, has its next one already.

    Args:
        folder: what submitit wrote for this job, `slurm/` in the run's folder.
        without_nodes: nodes that the next job is not to run on.
    """
    job = environment["SLURM_JOB_ID"]
    script, task = folder / f"{job}_submission.sh", folder / f"{job}_submitted.pkl"
    if environment.get("SLURM_ARRAY_JOB_ID") or not (script.exists() and task.exists()):
        _say(f"no next job: {job} is a task of an array, or {script} is gone")
        return False
    if shutil.which("sbatch") is None:
        _say("no next job: there is no sbatch on this node")
        return False
    known = next_job(folder, job)
    if known is not None and waiting_job(folder.parent) == known:
        _say(f"job {known} waits to go on")
        return True
    command = ["sbatch", "--parsable", f"--dependency=afterany:{job}", "--export=ALL"]
    command += [f"--exclude={','.join(without_nodes)}"] if without_nodes else []
    try:
        done = subprocess.run(
            [*command, str(script)],
            env=next_environment(environment),
            capture_output=True,
            text=True,
            check=False,
            timeout=_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        _say(f"no next job: {error}")
        return False
    following = done.stdout.strip().partition(";")[
        0
    ]  # with the cluster's name behind it where there are several
    if done.returncode or not following.isdigit():
        _say(f"no next job: sbatch says {(done.stderr or done.stdout).strip() or done.returncode}")
        return False
    # where submitit looks for them; the job waits for the end of this one
    shutil.copyfile(task, folder / f"{following}_submitted.pkl")
    shutil.copyfile(script, folder / f"{following}_submission.sh")
    (folder / f".after-{job}-{following}").touch()
    note_jobs(folder.parent, [following])
    _say(f"job {following} goes on when job {job} has ended")
    return True


def next_job(folder: Path, job: str) -> str | None:
    """Return the job that goes on after a job of a chain; None where it submitted none."""
    found = [path.name.rpartition("-")[2] for path in folder.glob(f".after-{job}-*")]
    return max(found, key=int, default=None)


def next_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that the next job of the chain is submitted with."""
    kept = {
        name: value
        for name, value in environment.items()
        if name in _KEPT or not name.startswith(_OWN_PREFIXES)
    }
    starts = str(restarts_of(environment) + 1)
    return {**kept, CHAIN_VARIABLE: chain_of(environment), STARTS_VARIABLE: starts}


def excluded_in(environment: Mapping[str, str]) -> list[str]:
    """Return the nodes that this job is not to run on; none where SLURM does not say."""
    if shutil.which("scontrol") is None:
        return []
    command = ["scontrol", "show", "--oneliner", "job", environment["SLURM_JOB_ID"]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = [word.partition("=")[2] for word in done.stdout.split() if word.startswith("ExcNodeList=")]
    return [name for name in found if name != "(null)"]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
