"""The options of `launchers/submit.py` and `selfmask launch`, which are the same. Knows no launcher."""

import argparse

EPILOG = "`selfmask help` lists the sections of a configuration, and `selfmask help optim` the keys of one."


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options to `parser`, with a description and an epilog."""
    parser.description = (
        "Start a run on this machine or on a SLURM cluster; with several --config or --seeds, several runs."
    )
    parser.epilog = EPILOG
    parser.add_argument(
        "--nodes", type=_positive, default=1, metavar="N", help="nodes; local: groups of processes (1)"
    )
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
        help="dry run: longest time for `selfmask plan`, memory and traffic of each engine; 0: without (120)",
    )
    parser.add_argument(
        "--experts-array",
        action="store_true",
        help="SLURM: a cascade as three jobs, its experts as a job array with a task of N nodes for each",
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


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of nodes")
    return number
