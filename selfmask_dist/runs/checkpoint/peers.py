"""The processes that save and load together, and the few things that they tell each other.

Saving goes on beside training, so its messages have a process group of their own, on gloo: they never meet
training's collectives, and no GPU waits for them.
"""

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from selfmask_dist.parallel.world import World

_made: list[tuple[Any, Any]] = []  # the run's process group, and the one for saving beside it


class LostPeersError(RuntimeError):
    """A message did not arrive: another process is gone, and no later message of the group can be trusted."""


@dataclass(frozen=True)
class Peers:
    """This process's place among those that save together; alone, it needs no process group.

    group: the one for their messages, which raise LostPeersError where another process is gone; None is
        training's own, with its own errors, which only loading may use.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    @property
    def is_main(self) -> bool:
        """Say whether this process commits."""
        return self.rank == 0

    @contextmanager
    def _messages(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if self.group is None:
                raise
            raise LostPeersError(f"another process is gone: {error}") from error

    def share(self, value: Any) -> list[Any]:
        """Return what every rank gave, by rank. Collective: every rank must call."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with self._messages():
            dist.all_gather_object(found, value, group=self.group)
        return found

    def gather(self, value: Any) -> list[Any]:
        """Return what every rank gave, by rank, on the main one; an empty list on the others. Collective."""
        if self.size == 1:
            return [value]
        found: list[Any] | None = [None] * self.size if self.is_main else None
        with self._messages():
            dist.gather_object(value, found, dst=0, group=self.group)
        return found or []

    def from_main(self, fn: Callable[[], Any]) -> Any:
        """Call `fn` on the main rank and return on all what it returned. Collective: every rank must call.

        Raises:
            OSError: `fn` raised; on the main rank its own error.
        """
        told: list[Any] = [None, None]
        failure: Exception | None = None
        if self.is_main:
            try:
                told[0] = fn()
            except Exception as error:
                failure, told[1] = error, str(error)
        if self.size > 1:
            with self._messages():
                dist.broadcast_object_list(told, src=0, group=self.group)
        if failure is not None:
            raise failure
        if told[1] is not None:
            raise OSError(errno.EIO, told[1])
        return told[0]


def loading_peers(world: World) -> Peers:
    """Return the processes of a run for loading, which nothing goes on beside."""
    return Peers(world.rank, world.size)


def saving_peers(world: World) -> Peers:
    """Return the processes of a run with a process group for saving. Collective: every rank must call."""
    if world.size == 1:
        return Peers()
    default = dist.group.WORLD
    if not _made or _made[0][0] is not default:
        _made[:] = [(default, dist.new_group(backend="gloo"))]
    return Peers(world.rank, world.size, _made[0][1])
