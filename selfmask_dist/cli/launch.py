"""`selfmask launch`: start runs on this machine or on a SLURM cluster.

In a checkout, `python launchers/submit.py` is the same command.
"""

import argparse

from selfmask_dist.common.shipped import shipped_module


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `selfmask launch` to the command line, with the options of `launchers/submit.py`."""
    command = commands.add_parser(
        "launch",
        help="start a run, or several, on this machine or on a SLURM cluster",
    )
    shipped_module("launchers.options").add_options(command)
    command.set_defaults(command=_launch)


def _launch(options: argparse.Namespace) -> int:
    status: int = shipped_module("launchers.submit").launch(options)
    return status
