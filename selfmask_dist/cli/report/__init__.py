"""`selfmask report RUN ...`: what runs did, as one HTML page that needs nothing else.

    reading (a run's folder, whatever state it is in) -> sections, charts (data) -> page.html (markup)

No script, no address outside of the file, and a policy in its head that forbids both.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from selfmask_dist.common import names


def add_command(commands: Any) -> None:
    """Add `report` to the command line."""
    command = commands.add_parser("report", help="one HTML page about a run, or about several side by side")
    command.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs, in any state")
    command.add_argument(
        "--out", metavar="FILE", help="where the page goes (RUN/report.html; of several runs ./report.html)"
    )
    command.set_defaults(command=_report)


def _report(options: argparse.Namespace) -> None:
    from selfmask_dist.cli.report.page import write_report  # imports torch

    runs = [Path(run) for run in options.runs]
    default = runs[0] / names.REPORT if len(runs) == 1 else Path(names.REPORT)
    path = Path(options.out) if options.out else default
    problems = write_report(runs, path)
    for problem in problems:
        print(f"note: {problem}", file=sys.stderr)
    print(f"{path}: {path.stat().st_size:,} bytes")
