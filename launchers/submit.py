"""Start a run: on this machine, or on a SLURM cluster. `selfmask launch` is the same command.

    python launchers/submit.py --nodes 2 --config configs/supervised_rn18.yaml data.train=shards/train \\
        data.test=shards/test

With `--seeds 0,1,2`, or several `--config`, it starts a run for each: a job each on a cluster (with `--array`
a task each of one job), one after the other here. The configuration and what can be seen to fail later are
checked before anything starts. Knows nothing of training.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # started by its path: Python put this file's folder on the path, not the one above it
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    __package__ = "launchers"

from selfmask_dist.common import names
from selfmask_dist.common.shipped import find_config
from selfmask_dist.config import Config, load_config, to_yaml
from selfmask_dist.config.config import load_with_places
from selfmask_dist.config.help import unrecognized
from selfmask_dist.config.site import Site, find_site
from selfmask_dist.runs import owner
from selfmask_dist.runs.folder import is_finished, run_path
from selfmask_dist.runs.verdict import closing

from . import local
from .options import add_options
from .preflight import preflight
from .shards import PictureFolder, convert, picture_folders
from .site import Partition, ask_cluster, read_partitions
from .snapshot import take_snapshot

_ASKED_TO_STOP = (128 + signal.SIGINT, 128 + signal.SIGTERM)


@dataclass(frozen=True)
class PlannedRun:
    """One of the runs to start, with the arguments of `selfmask train` that give its configuration."""

    config: Config
    arguments: tuple[str, ...]
    pictures: tuple[PictureFolder, ...] = ()  # what becomes tars first; the configuration names the tars


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, and return its exit status."""
    parser = argparse.ArgumentParser(prog="submit.py")
    add_options(parser)
    options, rest = parser.parse_known_args(arguments)
    if any(word.startswith("-") for word in rest):
        parser.error(unrecognized(rest, Config))
    options.overrides = [*options.overrides, *rest]  # argparse ends them at the first option behind them
    try:
        return launch(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def launch(options: argparse.Namespace) -> int:
    """Start the runs that the options of `add_options` ask for, and return the exit status.

    Raises:
        ValueError: a configuration is wrong, or something would fail later; nothing was started.
    """
    site = find_site(options.site)
    if site.path is not None:
        print(f"site {site.path}", file=sys.stderr)
    if options.cluster == "auto":
        found = shutil.which("sbatch") and _has_slurm_configuration()
        options.cluster = "slurm" if found else "local"
    partitions = read_partitions() if options.cluster == "slurm" else []
    return submit(plan_runs(options.config, options.seeds, options.overrides, site, partitions), options)


def plan_runs(
    files: Sequence[str],
    seeds: Sequence[int],
    overrides: Sequence[str],
    site: Site,
    partitions: Sequence[Partition] = (),
) -> list[PlannedRun]:
    """Return a run for each file and seed.

    Where the nodes of a cluster have GPUs, and nothing else is said, a job asks for them.

    Their names tell them apart: the file's name without its ending is added where there are several files,
    and `seed<n>` where seeds are given.

    Raises:
        ValueError: a configuration is wrong, or two runs would share a folder.
    """
    runs = []
    place = f"--site={site.path or 'none'}"
    for file in files or (None,):
        for seed in seeds or (None,):
            # by its path: a name that ships could mean another file on a node
            arguments = [place, *([f"--config={find_config(file).resolve()}"] if file else [])]
            first, said = load_with_places(file, overrides, site=site)
            suffix = f"-{Path(file).stem}" if file and len(files) > 1 else ""
            suffix += f"-seed{seed}" if seed is not None else ""
            own = [f"seed={seed}"] if seed is not None else []
            own += [f"run.name={first.run.name}{suffix}"] if suffix else []
            own += ask_cluster(first, said, partitions)
            pictures = picture_folders(first, site)
            own += [folder.as_override for folder in pictures]
            config = load_config(file, [*overrides, *own], site=site)
            runs.append(PlannedRun(config, (*arguments, *overrides, *own), tuple(pictures)))
    folders = [str(run_path(run.config)) for run in runs]
    if shared := [folder for folder in folders if folders.count(folder) > 1]:
        raise ValueError(
            f"two runs would write to {shared[0]}; give each seed once and files of different names"
        )
    return runs


def submit(runs: Sequence[PlannedRun], options: argparse.Namespace) -> int:
    """Start the runs as `options` say, and return the exit status: the first that is not 0.

    Raises:
        ValueError: something would fail later; the message names all of it, and nothing was started.
    """
    cluster = options.cluster
    if options.experts_array:
        _check_experts_array(runs, cluster)
    if options.array:
        _check_array(runs, options)
    _preflight(runs, cluster, options)
    if options.dry_run:
        _show(runs, cluster, options)
        return 0
    left = []
    for run in runs:
        if is_finished(run.config):
            folder = run_path(run.config)
            print(f"{folder} is finished: nothing is left to do\n{closing(folder)}", file=sys.stderr)
        else:
            left.append(run)
    runs = left
    for pictures in dict.fromkeys(one for run in runs for one in run.pictures):
        convert(pictures)
    if cluster == "slurm" and runs:
        return _submit_to_slurm(runs, options)
    statuses = []
    for run in runs:
        statuses.append(_run_here(run, options.nodes))
        if statuses[-1] in _ASKED_TO_STOP:
            return statuses[-1]
    return next((status for status in statuses if status), 0)


def _submit_to_slurm(runs: Sequence[PlannedRun], options: argparse.Namespace) -> int:
    from . import array, slurm

    nodes = {"num_nodes": options.nodes, "least_nodes": options.least_nodes}
    for run in runs:
        least = options.least_nodes
        at_least = "" if least is None else f" (or fewer nodes, at least {least})"
        print(in_short(run.config, options.nodes) + at_least, file=sys.stderr)
        if options.plan_seconds and run.config.launch.gpus_per_node:
            print(_plan(run, "slurm", options, "--line"), file=sys.stderr)
    if options.array:
        jobs = array.submit_array([(run.config, run.arguments) for run in runs], **nodes)
    else:
        jobs = [
            slurm.submit(
                run.config, train_arguments=run.arguments, experts_array=options.experts_array, **nodes
            )
            for run in runs
        ]
    folders = [run_path(run.config) for run in runs]
    return max(map(slurm.wait_for, jobs, folders)) if options.wait else 0


def in_short(config: Config, num_nodes: int) -> str:
    """Return in a line what a job asks for."""
    launch = config.launch
    processes = num_nodes * (launch.processes_per_node or launch.gpus_per_node or 1)
    gpus = f" x {launch.gpus_per_node} GPUs" if launch.gpus_per_node else ", no GPU"
    cpus = f", {launch.cpus_per_process} CPUs each" if launch.cpus_per_process else ""
    images = config.train.global_batch_size // processes
    where = f" in partition {launch.partition}" if launch.partition else ""
    return (
        f"{config.run.name}: {num_nodes} node(s){gpus}{where}; {processes} process(es){cpus}, {images} "
        f"images a step each"
    )


def _check_array(runs: Sequence[PlannedRun], options: argparse.Namespace) -> None:
    if options.cluster != "slurm":
        raise ValueError("--array makes a SLURM job; on this machine runs are made one after the other")
    if options.experts_array:
        raise ValueError("--array and --experts-array: an array of arrays there is not; leave one out")
    from .array import check_array

    check_array([run.config for run in runs])


def _check_experts_array(runs: Sequence[PlannedRun], cluster: str) -> None:
    if cluster != "slurm":
        raise ValueError("--experts-array makes SLURM jobs; on this machine groups of processes do the same")
    for run in runs:
        if run.config.method != "cascade":
            raise ValueError(f"--experts-array is for method=cascade, and method is {run.config.method}")
        if run.config.launch.requeue == "chain":
            raise ValueError(
                "launch.requeue=chain and --experts-array: jobs of the array wait for one that ended well, "
                "and a job that a next one goes on with does not; leave --experts-array out"
            )


def _preflight(runs: Sequence[PlannedRun], cluster: str, options: argparse.Namespace) -> None:
    complaints: dict[str, None] = {}  # by text: what is wrong with all runs is said once
    for run in runs:
        try:
            preflight(
                run.config,
                cluster=cluster,
                num_nodes=options.nodes,
                least_nodes=options.least_nodes,
                is_dry=options.dry_run,
                coming={str(folder.target) for folder in run.pictures},
            )
        except ValueError as error:
            complaints |= dict.fromkeys(line.strip() for line in str(error).splitlines())
    if complaints:
        raise ValueError("\n       ".join(complaints))


def _show(runs: Sequence[PlannedRun], cluster: str, options: argparse.Namespace) -> None:
    """Print what would run, the configuration, and once for each file what the planner reckons."""
    planned: set[str] = set()
    for folder in dict.fromkeys(folder for run in runs for folder in run.pictures):
        print(f"# {folder}")
    if options.array:
        from .array import array_script

        configs = [run.config for run in runs]
        print(array_script(configs, num_nodes=options.nodes, least_nodes=options.least_nodes))
    for run in runs:
        if options.array:
            pass  # the script above is that of all
        elif cluster == "slurm":
            from . import slurm

            scripts = slurm.batch_scripts(
                run.config,
                num_nodes=options.nodes,
                least_nodes=options.least_nodes,
                experts_array=options.experts_array,
            )
            print(scripts)
        else:
            for process in local.plan_processes(
                run.config, num_nodes=options.nodes, train_arguments=run.arguments
            ):
                print(f"# {process}")
        print(to_yaml(run.config))
        source = next((word for word in run.arguments if word.startswith("--config=")), "")
        if options.plan_seconds and source not in planned:
            planned.add(source)
            plan = _plan(run, cluster, options)
            print("\n".join(f"# {line}".rstrip() for line in plan.splitlines()))


def _plan(run: PlannedRun, cluster: str, options: argparse.Namespace, *more: str) -> str:
    """Return what `selfmask plan`, a process that imports torch, says of memory, traffic and time."""
    launch = run.config.launch
    if cluster == "slurm":
        per_node = launch.processes_per_node or launch.gpus_per_node or 1
    else:
        planned = local.plan_processes(run.config, num_nodes=options.nodes, train_arguments=())
        per_node = len(planned) // options.nodes
    command = [sys.executable, "-m", "selfmask_dist.cli", "plan", *run.arguments]
    command += [f"--nodes={options.nodes}", f"--gpus-per-node={per_node}", *more]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=options.plan_seconds
        )
    except subprocess.TimeoutExpired:
        return f"no plan: `selfmask plan` took longer than --plan-seconds {options.plan_seconds:g}"
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        return f"no plan: `selfmask plan` says {reason}"
    return done.stdout.rstrip()


def _has_slurm_configuration() -> bool:
    """Return whether sbatch would find its cluster; SLURM's packages alone, as on a laptop, make none."""
    places = ("/etc/slurm/slurm.conf", "/etc/slurm-llnl/slurm.conf", "/run/slurm/conf/slurm.conf")
    if "SLURM_CONF" in os.environ or any(Path(place).exists() for place in places):
        return True
    done = subprocess.run(["sbatch", "--version"], capture_output=True, check=False)
    return (
        done.returncode == 0 and subprocess.run(["sinfo"], capture_output=True, check=False).returncode == 0
    )


def _run_here(run: PlannedRun, num_nodes: int) -> int:
    folder = run_path(run.config)
    environment = owner.launcher_environment()

    def plan(restart: int) -> list[local.Process]:
        return local.plan_processes(
            run.config,
            num_nodes=num_nodes,
            train_arguments=run.arguments,
            restart=restart,
            environment=environment,
        )

    first = plan(0)  # what cannot be planned cannot be run: said before the run's folder is made
    if "CUDA_VISIBLE_DEVICES" in first[0].environment:
        (folder / names.STACKS).mkdir(parents=True, exist_ok=True)  # where NCCL writes what it was doing
    if run.config.launch.snapshot and "SELFMASK_RESTARTS" not in os.environ:
        environment |= take_snapshot(folder)
    try:
        return local.run_processes(
            plan,
            logs=folder / "logs",
            max_restarts=run.config.launch.max_restarts,
            stop_seconds=run.config.checkpoint.stop_seconds,
        )
    finally:
        owner.release(folder)


if __name__ == "__main__":
    sys.exit(main())
