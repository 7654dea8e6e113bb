"""`selfmask train`: one process of a run. The place where a run's method is chosen.

method   mask, finetune, probe, frozen   -> training.run
         cascade                         -> cascade.run
         packnet, supsup, lottery, ...   -> procedures.run
"""

import argparse
import contextlib
import faulthandler
import os
import sys
from collections.abc import Iterator
from typing import Any

from selfmask_dist.cli.errors import explain
from selfmask_dist.common import names
from selfmask_dist.config import Config, load_config
from selfmask_dist.config.conflicts.unread import unread
from selfmask_dist.config.site import find_site
from selfmask_dist.runs import exit_status
from selfmask_dist.runs.folder import (
    check_start,
    is_finished,
    note_failed_start,
    remove_measured,
    run_path,
)
from selfmask_dist.runs.owner import Claim, check_free
from selfmask_dist.runs.verdict import closing


def run(config: Config, *, part: str | None = None) -> dict[str, Any]:
    """Run a configuration to its end and return what `result.json` holds. Every process of the run calls
    this.

    Args:
        part: of a cascade, the only one to run; see `run_cascade`.

    Raises:
        ValueError: the configuration, the data or the backbone cannot be used; the message says which and how
            to mend it.
        NonFiniteError: training diverged.
    """
    # what trains imports torch, and `selfmask --help` must not wait for it
    from selfmask_dist.config.procedures import PROCEDURES
    from selfmask_dist.parallel import join_world
    from selfmask_dist.runs.context import stacks_path
    from selfmask_dist.runs.preempt import StopRequest
    from selfmask_dist.training.run import run_in

    faulthandler.enable(sys.__stderr__ or sys.stderr)  # a crash shows where; a notebook replaces sys.stderr
    if part is not None and config.method != "cascade":
        raise ValueError(f"--part is of a cascade, and method is {config.method}")
    is_restart = _is_restart()
    stacks = stacks_path(run_path(config))
    with (
        _claimed(config, part),
        StopRequest(force_after=config.checkpoint.stop_seconds, stacks=stacks) as stop,
    ):
        if config.method == "cascade":
            from selfmask_dist.cascade.run import run_cascade
            from selfmask_dist.cli.plan.experts import bytes_of_a_process

            return run_cascade(
                config, stop, is_restart=is_restart, part=part, bytes_needed_fn=bytes_of_a_process
            )
        if config.method in PROCEDURES:
            from selfmask_dist.procedures import run_procedure

            return run_procedure(config, stop, is_restart=is_restart)
        with join_world(
            config.engine.device, threads=config.engine.threads, needs_group=config.engine.name != "ddp"
        ) as world:
            return run_in(config, world, stop, is_restart=is_restart)


@contextlib.contextmanager
def _claimed(config: Config, part: str | None) -> Iterator[None]:
    """Hold the run's folder, or an expert's that is trained by itself, against other processes.

    The main rank does it for all of them.

    Raises:
        RunHeldError: another process trains there.
    """
    if not _is_main():
        yield
        return
    folder = run_path(config)
    if part is not None and part.startswith(names.expert("")):
        check_free(folder)  # of the whole cascade
        folder = folder / part
    else:
        for expert in sorted(folder.glob(names.expert("*"))):
            check_free(expert)
    with Claim(folder):
        is_new = part is None and not (folder / names.CONFIG).exists()
        try:
            yield
        except (ValueError, OSError):
            if is_new:
                note_failed_start(config)
            raise


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _is_restart() -> bool:
    """Return whether a launcher has started this run before."""
    return bool(int(os.environ.get("SELFMASK_RESTARTS", 0)))


def train(options: argparse.Namespace) -> int:
    """Run `selfmask train`; returns the exit status."""
    config = load_config(options.config, options.overrides, site=find_site(options.site))
    for note in unread(config, options.overrides) if _is_main() else ():
        print(f"note: {note}", file=sys.stderr)
    # said before torch is imported, which takes seconds; the other ranks may find the folder half made
    if _is_main():
        check_start(config, is_restart=_is_restart() or options.part not in (None, names.ROUTER))
    if is_finished(config, is_restart=_is_restart()):
        if _is_main():
            folder = run_path(config)
            remove_measured(config)  # it may have been killed on the way
            print(f"{folder} is finished: nothing is left to do\n{closing(folder)}", file=sys.stderr)
        return exit_status.OK
    from selfmask_dist.runs.ending.leaving import departure
    from selfmask_dist.runs.preempt import Preempted

    with contextlib.redirect_stderr(_Unfailing(sys.stderr)):
        departure.arm()
        try:
            run(config, part=options.part)
        except Preempted:
            print(f"{process_name()}stopped as asked, to go on later", file=sys.stderr)
            return exit_status.REQUEUE
        except Exception as error:
            return _end_after(error)
        return exit_status.OK


def _end_after(error: Exception) -> int:
    """Say what an error was and return the exit status. One of several processes does not return: it is gone.

    Raises:
        Exception: the error, in a process that is alone, where it is neither a lost process nor its device.
    """
    from selfmask_dist.runs.ending.leaving import departure, status_of

    departure.note(error)
    status, told = status_of(error), explain(error)
    if told is not None and told[0] == status:
        if not departure.is_armed:
            raise error
        departure.tell(error, f"{process_name()}{told[1]}")
    elif status in (exit_status.LOST, exit_status.DEVICE):
        departure.tell(error)
        what = {exit_status.LOST: "lost another process", exit_status.DEVICE: "this process's device failed"}
        print(f"{process_name()}{what[status]}, to be started again: {error}", file=sys.stderr)
    elif not departure.is_armed:
        raise error
    else:
        departure.tell(error)
    if departure.is_armed:
        departure.leave(status)
    return status


def process_name() -> str:
    """Return what a message of this process opens with, where there are several."""
    return f"rank {os.environ['RANK']}: " if os.environ.get("WORLD_SIZE", "1") != "1" else ""


class _Unfailing:
    """Standard error, mostly a log on a disk: when that is full, what is said is lost, and not the run."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
