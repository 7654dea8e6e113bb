"""What a run in progress has around it: its files, the request to stop, the watchdog, the heartbeat.

    with open_run(config, directory, world, stop) as context:  # the same on every rank; files on the main one
        ... context.writer ... context.check() ...

Knows nothing of what the run does.
"""

import gc
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from selfmask_dist.common import names
from selfmask_dist.config import Config
from selfmask_dist.parallel import START_TIMEOUT, World, set_timeout
from selfmask_dist.runs.checkpoint import DamagedCheckpointError
from selfmask_dist.runs.ending.leaving import departure, is_lost_process
from selfmask_dist.runs.exit_status import plain_status
from selfmask_dist.runs.metrics import MetricsWriter
from selfmask_dist.runs.preempt import Preempted, StopRequest
from selfmask_dist.runs.status import Heartbeat
from selfmask_dist.runs.watchdog import Watchdog

_VOTE_SECONDS = 2.0  # between two votes of `PacedCheck`
_MOST_TURNS = 256  # between them


@dataclass(frozen=True)
class RunContext:
    """What a process of a run works with: where it writes, who it works with, and when it has to stop.

    directory: the run's folder. writer: metrics, events and messages. stop: whether someone asked to stop.
    watchdog: is told of every step. heartbeat: keeps `status.json`, on the main rank only.
    """

    directory: Path
    world: World
    writer: MetricsWriter
    stop: StopRequest
    watchdog: Watchdog
    heartbeat: Heartbeat | None

    def check(self) -> None:
        """Agree with all ranks on whether to go on, for example between two batches of an evaluation.

        Collective: every rank must call.

        Raises:
            Preempted: some rank was asked to stop.
        """
        self.watchdog.beat()
        votes = torch.tensor([float(self.stop.requested)], device=self.world.device)
        if self.world.sum(votes).item():
            raise Preempted

    def paced_check(self) -> "PacedCheck":
        """Return a `check` for a loop of many short turns, which votes every few seconds only."""
        return PacedCheck(self)

    def update_status(self, **facts: Any) -> None:
        """Write facts to `status.json`, for example `state` or `num_steps`; nothing on other ranks."""
        if self.heartbeat is not None:
            self.heartbeat.write(**facts)


class PacedCheck:
    """`RunContext.check` in a loop whose turns take milliseconds: it votes about every two seconds.

    A vote makes every rank wait for its device and for the others. All ranks vote in the same turns, as each
    vote also says how many turns the main rank wants until the next one. Make one for each loop: turns of
    another loop may take longer. Collective: every rank must call equally often.
    """

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self._turns, self._interval = 0, 1
        self._since = time.monotonic()

    def __call__(self) -> None:
        """Say that a turn was made, and agree with all ranks on whether to go on, now and then.

        Raises:
            Preempted: some rank was asked to stop.
        """
        context = self._context
        context.watchdog.beat()
        self._turns += 1
        if self._turns < self._interval:
            return
        per_turn = (time.monotonic() - self._since) / self._turns
        # at most twice as many as before: the first turns may be quicker than the later ones
        wanted = max(min(int(_VOTE_SECONDS / max(per_turn, 1e-6)), 2 * self._interval, _MOST_TURNS), 1)
        votes = torch.tensor(
            [float(context.stop.requested), float(wanted if context.world.is_main else 0)],
            device=context.world.device,
        )
        is_stopped, interval = context.world.sum(votes).tolist()
        if is_stopped:
            raise Preempted
        self._turns, self._interval, self._since = 0, int(interval), time.monotonic()


@contextmanager
def open_run(
    config: Config,
    directory: Path,
    world: World,
    stop: StopRequest,
    *,
    parent: Path | None = None,
    ends_as: str = "finished",
) -> Iterator[RunContext]:
    """Open a run's files and start its watchdog; how the block ends becomes the run's state.

    Args:
        parent: the folder of the run that this one is a stage of.
        ends_as: the state after a block that ended well.
    """
    gc.collect()  # models and optimizers of the stage before are cycles: they would stay beside this one's
    writer = MetricsWriter(
        directory if world.is_main else None,
        progress=config.run.progress,
        wandb_mode=config.run.wandb,
        wandb_project=config.run.wandb_project,
        config=config.model_dump(mode="json"),
    )
    heartbeat = None
    if world.is_main:
        stage = {"stage": directory.name} if parent else {}
        heartbeat = Heartbeat(directory, lambda: writer.newest, parent=parent, **stage)
    limit = config.checkpoint.hang_minutes * 60
    timeout = timedelta(seconds=1.25 * limit + 10) if limit else START_TIMEOUT
    set_timeout(max(timeout, START_TIMEOUT))
    watchdog = Watchdog(
        timeout=limit,
        stacks=stacks_path(directory),
        heartbeat=heartbeat.write if heartbeat else None,
        on_first_beat=lambda: set_timeout(timeout),  # a little longer than the watchdog, which says more
    )
    is_preempted, damaged = False, None
    with writer, watchdog:
        context = RunContext(directory, world, writer, stop, watchdog, heartbeat)
        try:
            yield context
        except Preempted:
            reason = stop.reason or "another rank's signal"
            writer.event("preempted", reason=reason, step=writer.newest.get("step"))
            is_preempted = True
        except DamagedCheckpointError as error:
            writer.event("note", text=f"{error}: going on from the one before")
            damaged = error
        except BaseException as error:
            if plain_status(error) is None:  # a trial that diverged is caught, and the run goes on
                departure.note(error)
            context.update_status(state="lost a process" if is_lost_process(error) else "failed")
            raise
    if damaged is not None:
        raise damaged  # the run goes on, with everything made anew
    context.update_status(state="preempted" if is_preempted else ends_as)
    if is_preempted:
        raise Preempted  # outside of the writer, which would call it a failure


def stacks_path(directory: Path) -> Path:
    """Return where this process dumps what its threads are doing."""
    return directory / names.STACKS / f"rank-{os.environ.get('RANK', 0)}.txt"
