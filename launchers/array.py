"""Several runs, such as a number of seeds, as the tasks of one SLURM job array: `--array`.

    --seeds 0,1,2 --array -> sbatch --array=0-2 -> job 12_0: NAME-seed0, job 12_1: NAME-seed1, ...

One entry in the queue, and one script, that of the first run: all ask for the same. Each task is requeued and
counted by itself, and writes into its own run's folder. The copy of the code, and what submitit writes, lie
in the first run's. Knows nothing of training.
"""

from collections.abc import Sequence
from pathlib import Path

from selfmask_dist.config import Config
from selfmask_dist.runs.folder import run_path
from selfmask_dist.runs.submitted import note_jobs

from .slurm import TrainTask, accumulate_on_most, make_executor, node_range, own_stacks
from .snapshot import take_snapshot


def check_array(configs: Sequence[Config]) -> None:
    """Raise ValueError where runs cannot be the tasks of one array; the message says why, and the way out."""
    if len(configs) < 2:
        raise ValueError(
            "--array is for several runs; give --seeds 0,1,... or several --config, or leave it out"
        )
    first = configs[0].launch
    for config in configs[1:]:
        differing = [key for key, value in first if getattr(config.launch, key) != value]
        if differing:
            raise ValueError(
                f"--array: the tasks of an array ask for the same, and launch.{differing[0]} of "
                f"{config.run.name} is not that of {configs[0].run.name}; give it for all of them, or leave "
                "--array out"
            )
    if first.requeue == "chain":
        raise ValueError(
            "launch.requeue=chain and --array: a task of an array has no next job; leave --array out"
        )


def submit_array(
    runs: Sequence[tuple[Config, Sequence[str]]], *, num_nodes: int, least_nodes: int | None = None
) -> list[str]:
    """Submit one array of all runs, print where they write, and return the id of each one's task.

    Args:
        runs: the configuration of each, and the arguments of `selfmask train` that give it.
        num_nodes: of each task.
        least_nodes: SLURM may give a task any number of nodes from this one on, up to `num_nodes`.
    """
    folders = [run_path(config).resolve() for config, _ in runs]
    first, written = runs[0][0], folders[0] / "slurm"
    if first.launch.snapshot:
        take_snapshot(folders[0])
    written.mkdir(parents=True, exist_ok=True)
    tasks = [
        TrainTask(
            tuple(arguments),
            folder / "logs",
            config.launch.container,
            config.launch.master_port,
            config.engine.threads,
            config.launch.max_restarts,
            "requeue",  # a task of an array has no next job
            written,
            accumulate_on_most(config, num_nodes, least_nodes),
            config.launch.container_python,
            config.launch.bind and bool(config.launch.gpus_per_node),
            own_stacks(config, folder),
        )
        for (config, arguments), folder in zip(runs, folders, strict=True)
    ]
    executor = make_executor(first, written, node_range(num_nodes, least_nodes))
    jobs = [str(job.job_id) for job in executor.map_array(TrainTask.__call__, tasks)]
    for job, folder, task in zip(jobs, folders, tasks, strict=True):
        folder.mkdir(parents=True, exist_ok=True)
        note_jobs(folder, [job])
        print(f"submitted job {job} ({folder.name}); its processes write to {task.logs}", flush=True)
    return jobs


def array_script(configs: Sequence[Config], *, num_nodes: int, least_nodes: int | None = None) -> str:
    """Return the batch script that sbatch would get. Needs no program of SLURM's."""
    folder: Path = run_path(configs[0]).resolve() / "slurm"
    executor = make_executor(configs[0], folder, node_range(num_nodes, least_nodes), is_dry=True)
    executor.parameters["map_count"] = len(configs)
    return str(executor._make_submission_file_text("<task>", "dry-run"))
