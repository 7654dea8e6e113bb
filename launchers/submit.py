"""Start a run: on this machine, or on a SLURM cluster.

    python launchers/submit.py --nodes 2 --config configs/supervised_rn18.yaml data.train=shards/train \\
        data.test=shards/test

The configuration and what can be seen to fail later are checked before anything starts. Knows nothing of
training.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # Python puts this file's folder on the path; the packages are beside it
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launchers import local
from launchers.preflight import preflight
from launchers.snapshot import take_snapshot
from selfmask_dist.config import Config, describe, load_config, to_yaml


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        config = load_config(options.config, options.overrides)
        return submit(config, options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def submit(config: Config, options: argparse.Namespace) -> int:
    """Start the run that `options` ask for; returns the exit status.

    Raises:
        ValueError: something would fail later; the message names all of it.
    """
    cluster = options.cluster
    if cluster == "auto":
        cluster = "slurm" if shutil.which("sbatch") and _has_slurm_configuration() else "local"
    config_path = [f"--config={Path(options.config).resolve()}"] if options.config else []
    train_arguments = [*config_path, *options.overrides]
    preflight(config, cluster=cluster, num_nodes=options.nodes)
    if cluster == "slurm":
        from launchers import slurm

        return slurm.submit(
            config,
            num_nodes=options.nodes,
            train_arguments=train_arguments,
            dry_run=options.dry_run,
            wait=options.wait,
        )
    return _run_here(config, options, train_arguments)


def _has_slurm_configuration() -> bool:
    """Whether sbatch would find its cluster; packages alone, as on a laptop, make none."""
    places = ("/etc/slurm/slurm.conf", "/etc/slurm-llnl/slurm.conf", "/run/slurm/conf/slurm.conf")
    if "SLURM_CONF" in os.environ or any(Path(place).exists() for place in places):
        return True
    done = subprocess.run(["sbatch", "--version"], capture_output=True, check=False)
    return (
        done.returncode == 0 and subprocess.run(["sinfo"], capture_output=True, check=False).returncode == 0
    )


def _run_here(config: Config, options: argparse.Namespace, train_arguments: list[str]) -> int:
    run = Path(config.run.dir) / config.run.name
    environment: dict[str, str] = {}

    def plan(restart: int) -> list[local.Process]:
        return local.plan_processes(
            config,
            num_nodes=options.nodes,
            train_arguments=train_arguments,
            restart=restart,
            environment=environment,
        )

    processes = plan(0)  # also with --dry-run: what cannot be planned cannot be run
    if options.dry_run:
        for process in processes:
            print(f"# {process}")
        print(to_yaml(config))
        return 0
    if config.launch.snapshot and "SELFMASK_RESTARTS" not in os.environ:
        environment |= take_snapshot(run)
    return local.run_processes(plan, logs=run / "logs", max_restarts=config.launch.max_restarts)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="submit.py",
        description="Start a run on this machine or on a SLURM cluster.",
        epilog=describe(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--nodes", type=_positive, default=1, metavar="N", help="nodes; local: groups of processes (1)"
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file; without it, the defaults")
    parser.add_argument(
        "--cluster",
        choices=("auto", "slurm", "local"),
        default="auto",
        help="auto: slurm where sbatch and its configuration are found (auto)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print what would run (the batch script, on SLURM) and the resolved configuration",
    )
    parser.add_argument("--wait", action="store_true", help="SLURM: return when the job has ended")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings over the file's, see below"
    )
    return parser


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of nodes")
    return number


if __name__ == "__main__":
    sys.exit(main())
