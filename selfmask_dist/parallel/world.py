"""Who am I among the processes of this run, and on which device.

Ranks come from the environment that torchrun sets; without it the run is one process and no group is made.
The processes of a run may leave their group and form smaller ones of equal size, each a world of its own, and
come together again (`num_groups`): everything below then runs unchanged on a part of the processes.
"""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
_CPU = torch.device("cpu")
# torch gives gloo's errors no type of their own, so they are known by their words
_GLOO = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "No route to host",
    "Timed out waiting",
    "Application timeout caused pair closure",
    "Socket closed",
)
_OWN_FAULTS = ("invalid usage", "invalid argument")  # what NCCL says of a program that is wrong
START_TIMEOUT = timedelta(minutes=30)  # building, compiling and meeting take their time


class SumOverRanks(torch.autograd.Function):
    """All-reduce whose gradient is summed over ranks too: each rank's loss is a share of the global one."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values)
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad


@dataclass(frozen=True)
class World:
    """This process's place: `rank` of `size`, and the device it computes on."""

    rank: int = 0
    size: int = 1
    device: torch.device = _CPU

    @property
    def is_main(self) -> bool:
        """Say whether this process is rank 0, which writes files and logs."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over all ranks, in place. Collective: every rank must call."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_with_gradient(self, tensor: Tensor) -> Tensor:
        """Return the sum over all ranks; the gradient that comes back is summed over ranks as well.

        Collective, in forward and in backward: every rank must call.
        """
        if self.size == 1:
            return tensor
        summed: Tensor = SumOverRanks.apply(tensor)
        return summed

    def all_to_all(self, tensor: Tensor) -> Tensor:
        """Send row r of a tensor (size, ...) to rank r, and return the rows (size, ...) that ranks sent here.

        Collective: every rank must call.
        """
        if self.size == 1:
            return tensor
        received = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, tensor.contiguous())
        return received

    def from_main(self, make_fn: Callable[[], T]) -> T:
        """Return on every rank what `make_fn` returns on the main rank, the only one to call it.

        What a file system holds is decided this way: ranks that look for themselves may see different things,
        and a shared file system goes on saying "not there" for a while on a machine that looked too early.
        Collective: every rank must call.

        Args:
            make_fn: returns something small that can be pickled.

        Raises:
            ValueError, OSError: on every rank, what `make_fn` raised.
        """
        if self.size == 1:
            return make_fn()
        made: list[Any] = [None, None]
        if self.is_main:
            try:
                made[0] = make_fn()
            except (ValueError, OSError) as error:
                made[1] = error
        dist.broadcast_object_list(made, src=0)
        if made[1] is not None:
            raise made[1]
        value: T = made[0]
        return value

    def barrier(self) -> None:
        """Wait for all ranks. Collective: every rank must call."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def join_world(
    device: str = "auto",
    *,
    threads: int | None = None,
    timeout: timedelta = START_TIMEOUT,
    needs_group: bool = False,
    num_groups: int = 1,
) -> Iterator[World]:
    """Join the process group that the environment names (gloo on CPUs, nccl on GPUs) and leave it at the end.

    After an error the group is aborted: peers that are gone are not waited for. An exception whose attribute
    `is_agreed` is true was raised by all processes at the same place, and ends the group in peace.

    Args:
        device: auto, cpu or cuda; auto is cuda where there is one.
        threads: CPU threads of this process; None leaves torch's choice.
        needs_group: make a group for a single process too, as sharded engines want one.
        num_groups: neighbouring ranks form this many groups; see `group_of`. Every process joins equally
            often.

    Raises:
        ValueError: the processes do not divide into groups; cuda is asked for and there is none, or fewer
            GPUs than processes on this node.
    """
    size, rank, local_rank = _place_in_environment()
    if threads is not None:
        torch.set_num_threads(threads)
    if size % num_groups:
        raise ValueError(f"{size} processes do not divide into {num_groups} groups")
    place = _pick_device(device, local_rank)
    store = dist.HashStore() if size == 1 else _meeting_place(timeout)
    group, group_size = rank // (size // num_groups), size // num_groups
    _num_joins[0] += 1
    # torchrun's store outlives the processes that it starts again: the addresses in it are of the dead
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if group_size == 1 and not needs_group:
        yield World(device=place)
        return
    dist.init_process_group(
        "nccl" if place.type == "cuda" else "gloo",
        timeout=timeout,
        store=dist.PrefixStore(f"start-{start}/join-{_num_joins[0]}/group-{group}", store),
        rank=rank % group_size,
        world_size=group_size,
        device_id=place if place.type == "cuda" else None,
    )
    try:
        yield World(rank=rank % group_size, size=group_size, device=place)
    except BaseException as error:
        if group_size == 1 or getattr(error, "is_agreed", False):
            dist.destroy_process_group()
        else:
            abort_groups()
        raise
    dist.destroy_process_group()


def abort_groups() -> None:
    """Leave every process group at once, and let what is under way in them fail.

    `destroy_process_group` would wait for peers that may be gone. torch has no public way to abort all groups
    together, and one by one their NCCL communicators can wait for each other (pytorch issue 119797).
    """
    if dist.is_initialized():
        with suppress(RuntimeError):  # the error that is being raised says more than this one
            dist.distributed_c10d._abort_process_group()


def _place_in_environment() -> tuple[int, int, int]:
    """Return (world size, rank, local rank) as the launcher's variables have them.

    Raises:
        ValueError: one is no number, or the rank is not below the world size; such variables are left over
            from another program.
    """
    given = {key: os.environ.get(key, default) for key, default in _ENVIRONMENT}
    if bad := [f"{key}={value!r}" for key, value in given.items() if not str(value).isdecimal()]:
        raise ValueError(
            f"{', '.join(bad)} of the environment is no number; unset it, or start with a launcher"
        )
    size, rank, local_rank = (int(value) for value in given.values())
    if rank >= size:
        raise ValueError(
            f"RANK={rank} and WORLD_SIZE={size} of the environment do not go together (ranks count from 0): "
            f"unset RANK, LOCAL_RANK and WORLD_SIZE, or start with a launcher"
        )
    return size, rank, local_rank


def set_timeout(timeout: timedelta) -> None:
    """Set how long collectives wait for other processes from now on, in every group this one is in.

    Give all processes the same, at about the same time.
    """
    if dist.is_initialized():
        for group in list(dist.distributed_c10d._world.pg_map):
            dist.distributed_c10d._set_pg_timeout(timeout, group)


def group_of(num_groups: int) -> int:
    """Return which of `num_groups` groups this process belongs to."""
    size, rank, _ = _place_in_environment()
    return rank * num_groups // size


def num_processes() -> int:
    """Return the number of processes of the whole run."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_lost_peer(error: BaseException) -> bool:
    """Return whether `error` only says that another process, or the network, is gone.

    Where a peer is killed, hangs or cannot be reached, a collective (or the first meeting) fails here with an
    error that names no cause. It says nothing against the run, which may be started again.
    """
    text = str(error)
    if isinstance(error, dist.DistError):  # NCCL, and the store at which processes meet
        return not any(fault in text.lower() for fault in _OWN_FAULTS)
    return isinstance(error, RuntimeError) and any(words in text for words in _GLOO)


@functools.cache
def _meeting_place(timeout: timedelta) -> dist.Store:
    """Return the store that all processes of the run reach, for as long as they live."""
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    return store


_num_joins = [0]  # the same on every process, so that one join cannot be taken for another


_ENVIRONMENT = (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0"))


def _pick_device(device: str, local_rank: int) -> torch.device:
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu" or (device == "auto" and not available):
        return torch.device("cpu")
    if not available:
        raise ValueError("engine.device is cuda and this machine has no usable GPU; set engine.device=cpu")
    if local_rank >= available:
        raise ValueError(
            f"local rank {local_rank} has no GPU of its own ({available} here); set "
            f"launch.processes_per_node={available} or less"
        )
    place = torch.device("cuda", local_rank)
    torch.cuda.set_device(place)
    return place
