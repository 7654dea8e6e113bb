"""Running statistics of normalisation layers on many ranks, and batch normalisation over the global batch.

Per-rank statistics: each rank normalises by its own rows; before each step all ranks take rank 0's running
statistics, as DistributedDataParallel does. Synchronised: mean and variance are of all ranks' rows,

    mean = sum x / n      var = sum x^2 / n - mean^2      over rows, places and ranks

with two all-reduces a layer and step. Knows nothing of masks or engines.
"""

from collections.abc import Collection

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from selfmask_dist.masking.selection import is_norm
from selfmask_dist.parallel.parts import TensorPart
from selfmask_dist.parallel.world import SumOverRanks, World


class NormStatistics:
    """The running statistics inside a module."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._has_any = bool(self._buffers(training_only=False))

    def broadcast(self, world: World) -> None:
        """Give every rank rank 0's moving statistics, in one collective (none where nothing moves)."""
        if world.size == 1 or not self._has_any:
            return
        buffers = [b for b in self._buffers(training_only=True).values() if b.is_floating_point()]
        if not buffers:
            return
        flat = torch.cat([buffer.reshape(-1) for buffer in buffers])
        dist.broadcast(flat, src=0)
        for buffer, values in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
            buffer.copy_(values.view_as(buffer))

    def parts(self, world: World) -> list[TensorPart]:
        """Return the statistics as statistics/name, sharing their storage; those of rank 0 are the run's."""
        return [
            TensorPart(
                f"statistics/{name}",
                b.shape,
                b.detach(),
                copies=world.size,
                copy=world.rank,
                is_of_first=True,
            )
            for name, b in self._buffers(training_only=False).items()
        ]

    def check_names(self, names: Collection[str]) -> None:
        """Raise a ValueError where a state's statistics are not those of this module."""
        if odd := sorted(set(self._buffers(training_only=False)) ^ set(names)):
            raise ValueError(f"running statistics of the state do not fit this model's: {odd[:5]}")

    def _buffers(self, *, training_only: bool) -> dict[str, Tensor]:
        return {
            f"{module_name}.{name}": buffer
            for module_name, module in self._module.named_modules()
            if is_norm(module) and (module.training or not training_only)
            if not (training_only and isinstance(module, SyncedBatchNorm))  # theirs are equal by themselves
            for name, buffer in module.named_buffers(recurse=False)
        }


class SyncedBatchNorm(nn.BatchNorm2d):
    """Batch normalisation over the rows of all ranks, on CPUs too (`nn.SyncBatchNorm` runs on GPUs only)."""

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and self.track_running_stats) or world_size() == 1:
            return super().forward(input)
        axes = [0, *range(2, input.ndim)]
        values = input if input.dtype == torch.float64 else input.float()
        count = torch.tensor([float(values.numel() // values.shape[1])], device=input.device)
        sums = torch.cat([values.sum(axes), values.square().sum(axes), count.to(values.dtype)])
        total, total_square, rows = SumOverRanks.apply(sums).split([self.num_features] * 2 + [1])
        mean = total / rows
        var = (total_square / rows - mean.square()).clamp(min=0)
        self._move(mean.detach(), var.detach(), rows.detach())
        shape = (1, -1, *[1] * (input.ndim - 2))
        scale = (var + self.eps).rsqrt()
        shift = -mean * scale
        if self.affine:
            scale, shift = scale * self.weight, shift * self.weight + self.bias
        return (values * scale.view(shape) + shift.view(shape)).to(input.dtype)

    @torch.no_grad()
    def _move(self, mean: Tensor, var: Tensor, rows: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        step = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), step)
        self.running_var.lerp_((var * rows / (rows - 1).clamp(min=1)).to(self.running_var.dtype), step)


def world_size() -> int:
    """Return the number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def synchronise_batchnorm(module: nn.Module) -> int:
    """Make every BatchNorm2d of `module` normalise over the rows of all ranks, and return how many there are.

    Raises:
        ValueError: a kind of batch normalisation that this cannot change.
    """
    count = 0
    for name, child in module.named_modules():
        if not isinstance(child, _BatchNorm):
            continue
        if type(child) is not nn.BatchNorm2d:
            raise ValueError(
                f"{name} is a {type(child).__name__}, which backbone.batchnorm=sync cannot synchronise; use "
                f"train or frozen"
            )
        child.__class__ = SyncedBatchNorm
        count += 1
    return count
