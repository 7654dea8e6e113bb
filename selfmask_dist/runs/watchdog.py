"""A thread that notices when nothing moves, and writes a heartbeat for `selfmask status`.

    no beat for `timeout` seconds -> the stacks of all threads go to the run directory -> exit with HUNG

Knows nothing of training but that it beats.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from selfmask_dist.common.files import write_text
from selfmask_dist.runs.exit_status import HUNG
from selfmask_dist.runs.preempt import dump_stacks

_INTERVAL = 2.0
_RECORD_SECONDS = 5.0  # for torch to give its record
_PATIENCE = 10  # times the timeout, until the first beat: building, compiling and meeting take their time


class Watchdog:
    """Watches between `with` and its end.

    Args:
        timeout: seconds without a beat until the process ends itself; 0: never.
        stacks: where the stacks go.
        heartbeat: called every few seconds while the process lives, with the seconds since the last beat.
        on_first_beat: called at the first beat, in the thread that beats.
    """

    def __init__(
        self,
        *,
        timeout: float,
        stacks: Path,
        heartbeat: Callable[[float], None] | None = None,
        on_first_beat: Callable[[], None] = lambda: None,
        exit_process: Callable[[int], Any] = os._exit,
    ) -> None:
        self._timeout = timeout
        self._stacks = stacks
        self._heartbeat = heartbeat
        self._on_first_beat = on_first_beat
        self._exit_process = exit_process
        self._beaten = time.monotonic()
        self._has_moved = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self) -> None:
        """Something moved: a step, a batch of an evaluation."""
        self._beaten = time.monotonic()
        if not self._has_moved:
            self._has_moved = True
            self._on_first_beat()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        interval = min(_INTERVAL, self._timeout / 4) if self._timeout else _INTERVAL
        seen = self._beaten
        woken = time.monotonic()
        while not self._end.wait(interval):
            now = time.monotonic()
            if now - woken > 4 * interval + 1 and self._beaten == seen:
                self._beaten = now  # this process itself was stopped or starved: that proves nothing
            woken, seen = now, self._beaten
            silence = now - self._beaten
            if self._heartbeat is not None:
                self._heartbeat(max(silence, 0.0))
            limit = self._timeout if self._has_moved else _PATIENCE * self._timeout
            if self._timeout and silence > limit:
                print(f"nothing moved for {silence:.0f} s: see {self._stacks}", file=sys.stderr, flush=True)
                dump_stacks(self._stacks, f"nothing moved for {silence:.0f} s")
                dump_collectives(self._stacks.with_suffix(".collectives.json"))
                self._exit_process(HUNG)
                return


def dump_collectives(path: Path) -> None:
    """Write what torch's flight recorder holds: the last collectives of this process, and how far each came.

    It records where TORCH_FR_BUFFER_SIZE is set, as launchers do where there are GPUs. NCCL's own dump would
    come with its timeout, after this process is gone.
    """
    thread = threading.Thread(target=_dump_collectives, args=(path,), daemon=True)
    thread.start()
    thread.join(_RECORD_SECONDS)  # a device that hangs may keep it waiting


def _dump_collectives(path: Path) -> None:
    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):
        try:
            text = getattr(torch._C._distributed_c10d, name)()
            if json.loads(text).get("entries"):
                write_text(path, text if isinstance(text, str) else text.decode())
                return
        except (AttributeError, RuntimeError, ValueError, OSError) as error:
            print(f"no record of collectives by {name}: {error}", file=sys.stderr, flush=True)
