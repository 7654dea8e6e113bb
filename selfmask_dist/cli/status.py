"""`selfmask status`, `logs` and `checkpoints`: what runs are doing, from their files alone."""

import argparse
import collections
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selfmask_dist.common import names
from selfmask_dist.common.text import age, positive, table
from selfmask_dist.runs.ending.notes import failed_ranks
from selfmask_dist.runs.status import COLUMNS, memory_of_ranks, read_status, stages_of, stragglers
from selfmask_dist.runs.submitted import waiting

_RANKS = re.compile(r"\d+")
_NUMBERS = ("step", "loss", "images/s", "restarts", "size")  # columns that are aligned to the right


def add_commands(commands: Any) -> None:
    """Add `status`, `logs` and `checkpoints` to the command line."""
    status = commands.add_parser("status", help="what runs are doing, from their files")
    status.add_argument("runs", nargs="*", metavar="RUN", help="folders of runs (all in ./runs)")
    status.set_defaults(command=_status)
    logs = commands.add_parser("logs", help="the end of what a process of a run printed")
    logs.add_argument("run", metavar="RUN")
    logs.add_argument(
        "--rank",
        type=int,
        metavar="R",
        help="which process (one that ended with an error of its own, if the last start failed, else 0)",
    )
    logs.add_argument("--lines", type=positive, default=40, metavar="N", help="how many lines (40)")
    logs.set_defaults(command=_logs)
    checkpoints = commands.add_parser("checkpoints", help="list, verify or prune a run's checkpoints")
    checkpoints.add_argument("action", choices=("list", "verify", "prune"))
    checkpoints.add_argument("run", metavar="RUN")
    checkpoints.add_argument("--keep", type=positive, default=1, metavar="N", help="prune: how many stay (1)")
    checkpoints.set_defaults(command=_checkpoints)


def _status(options: argparse.Namespace) -> int:
    marks = (names.CONFIG, names.SUBMITTED)
    runs = [Path(run) for run in options.runs] or sorted(
        {path.parent for mark in marks for path in Path("runs").glob(f"*/{mark}")}
    )
    if not runs:
        raise ValueError("there are no runs in ./runs; name their folders")
    from selfmask_dist.runs.verdict import verdict_of  # imports the configuration's schema, slowly

    rows, complaints = [], []
    for run in runs:
        try:
            rows.append({**read_status(run), "path": str(run)})
            stages = map(read_status, stages_of(run))
            rows += [{**row, "run": f"  {row['run']}", "path": ""} for row in stages]
        except ValueError as error:  # the others are shown all the same
            complaints.append(str(error))
    shown = [row["run"] for row in rows if row["path"]]
    for row in rows:
        if row["path"] and shown.count(row["run"]) > 1:
            row["run"] = row["path"]
    if rows:
        print(_table(COLUMNS, [[row[name] for name in COLUMNS] for row in rows]))
        for row in rows:
            if row["path"] and row["state"] == "pending" and (job := waiting(Path(row["path"]))) is not None:
                print(f"{row['run']}: {job}")
            if row["path"] and row["state"].startswith("running"):
                for line in filter(
                    None, (*stragglers(Path(row["path"])), memory_of_ranks(Path(row["path"])))
                ):
                    print(f"{row['run']}: {line}")
            for entry in verdict_of(Path(row["path"])) if row["path"] else ():
                print(f"{row['run']}: {entry['text']}")
    if complaints:
        raise ValueError("; ".join(complaints))
    return 0


def _logs(options: argparse.Namespace) -> int:
    folder = Path(options.run) / names.LOGS
    failed = failed_ranks(folder) if options.rank is None else {}
    rank = options.rank if options.rank is not None else next(iter(failed), 0)
    path = _log_of(folder, rank)
    job = waiting(Path(options.run))
    if not path.exists() and job is not None:
        raise ValueError(f"there is no {path} yet: the run {job}")
    if not path.exists():
        known = sorted((int(_RANKS.findall(found.stem)[0]), found) for found in folder.glob("rank*-*.log"))
        ranks = ", ".join("-".join(_RANKS.findall(found.stem)) for _, found in known)
        raise ValueError(
            f"there is no {path}; {f'there are ranks {ranks}' if known else 'there are no logs'}"
        )
    with open(path, errors="replace") as stream:
        print("".join(collections.deque(stream, maxlen=options.lines)), end="")
    if rank in failed:
        print(f"(rank {rank}, which ended with an error of its own, status {failed[rank]})", file=sys.stderr)
    if job is not None:
        print(f"the run {job}", file=sys.stderr)
    return 0


def _log_of(folder: Path, rank: int) -> Path:
    """Return the file with what a rank printed: its own, or the one of the ranks of its node."""
    for path in folder.glob("ranks-*.log"):
        first, last = map(int, _RANKS.findall(path.stem))
        if rank and first <= rank <= last:
            return path
    return folder / f"rank-{rank}.log"


def _checkpoints(options: argparse.Namespace) -> int:
    from selfmask_dist.runs import checkpoint  # imports torch

    run = Path(options.run)
    folder = run / names.CHECKPOINTS
    if not folder.is_dir():
        stages = sorted(str(path.parent) for path in run.glob(f"*/{names.CHECKPOINTS}"))
        hint = f"; those of its stages are in {', '.join(stages)}" if stages else ""
        raise ValueError(f"{run} has no checkpoints{hint}")
    if options.action == "prune":
        if (run / names.CONFIG).exists() and read_status(run)["state"] == "running":
            raise ValueError(f"{run} is running and prunes by itself (checkpoint.keep_last)")
        deleted = checkpoint.prune(folder, checkpoint.Retention(last=options.keep))
        print("\n".join(f"deleted {path.name}" for path in deleted) or "nothing to delete")
        return 0
    rows, num_bad = [], 0
    for path in checkpoint.committed(folder):
        try:
            size = sum(file.stat().st_size for file in path.iterdir())
            saved = f"{age(time.time() - path.stat().st_mtime)} ago"
        except FileNotFoundError:  # the run deleted it meanwhile
            continue
        rows.append([path.name, str(checkpoint.step_of(path)), f"{size / 1e6:,.1f} MB", saved])
        if options.action == "verify":
            problems = checkpoint.verify(path)
            num_bad += bool(problems)
            rows[-1].append("; ".join(problems) or "valid")
    print(_table(("checkpoint", "step", "size", "saved"), rows) if rows else "none is committed yet")
    for path in sorted(folder.glob("invalid-*")):
        print(f"set aside: {path}")
    return 1 if num_bad else 0


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return table([columns, *rows], right=[name in _NUMBERS for name in columns])
