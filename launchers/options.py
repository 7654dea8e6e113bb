"""The options of `launchers/submit.py` and `selfmask launch`, which are the same. Knows no launcher."""

import argparse
from typing import Any

EPILOG = "`selfmask help` lists the sections of a configuration, and `selfmask help optim` the keys of one."


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options to `parser`, with a description and an epilog."""
    parser.description = (
        "Start a run on this machine or on a SLURM cluster; with several --config or --seeds, several runs."
    )
    parser.epilog = EPILOG
    parser.add_argument(
        "--nodes",
        action=_Nodes,
        default=1,
        metavar="N",
        help="nodes; local: groups of processes (1). SLURM, N:M: as many as it gets, from N to M; a "
        "restart may get others",
    )
    parser.set_defaults(least_nodes=None)
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="FILE",
        help="YAML file, or the name of one that ships; without it, the defaults; given several times, a run "
        "for each, named NAME-FILE",
    )
    parser.add_argument(
        "--site",
        metavar="FILE",
        help="what this place says once for all its runs, below their own configuration; without it, "
        "$SELFMASK_SITE, ./site.yaml or ~/.config/selfmask/site.yaml; none: none. `selfmask site init` "
        "writes one",
    )
    parser.add_argument(
        "--seeds",
        type=_seeds,
        default=[],
        metavar="0,1,...",
        help="a run for each seed, named NAME-seed0, ...",
    )
    parser.add_argument(
        "--cluster",
        choices=("auto", "slurm", "local"),
        default="auto",
        help="auto: slurm where sbatch and its configuration are found (auto)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print what would run (the batch script, on SLURM), the resolved configuration and the plan",
    )
    parser.add_argument(
        "--plan-seconds",
        type=float,
        default=120.0,
        metavar="S",
        help="longest time for `selfmask plan`: a line before a job that asks for GPUs, and in a dry run "
        "memory and traffic of each engine; 0: without (120)",
    )
    parser.add_argument(
        "--experts-array",
        action="store_true",
        help="SLURM: a cascade as three jobs, its experts as a job array with a task of N nodes for each",
    )
    parser.add_argument(
        "--array",
        action="store_true",
        help="SLURM: the runs of --seeds and of several --config as the tasks of one array of jobs",
    )
    parser.add_argument("--wait", action="store_true", help="SLURM: return when the job has ended")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings over the file's, for example train.epochs=3",
    )


def _seeds(text: str) -> list[int]:
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not numbers with commas between them") from None


class _Nodes(argparse.Action):
    """Sets `nodes`, the most, and `least_nodes`: None where one number was given."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        words = str(values).split(":")
        numbers = [int(word) if word.isdecimal() else 0 for word in words]
        if len(words) > 2 or min(numbers) < 1 or numbers != sorted(numbers):
            raise argparse.ArgumentError(self, f"{values!r} is not a number of nodes, or a range such as 2:4")
        namespace.nodes = numbers[-1]
        namespace.least_nodes = numbers[0] if numbers[0] < numbers[-1] else None
