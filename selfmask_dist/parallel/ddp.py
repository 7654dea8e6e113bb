"""The replicated engine: every rank holds everything, gradients are averaged by DistributedDataParallel.

Each rank's loss is its share of the global mean, so the global gradient is the sum over ranks;
DistributedDataParallel averages, hence the factor `world.size`. With gradients equal on all ranks, masks stay
equal on all ranks. With `engine.weights=bf16` scores step tensor by tensor, see `lean`.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from selfmask_dist.data import Batch
from selfmask_dist.parallel.engine import Engine
from selfmask_dist.parallel.lean.by_tensor import ByTensor
from selfmask_dist.parallel.lean.held import InBf16, hold_in_bf16
from selfmask_dist.parallel.lean.sgd import LeanSGD

# NormStatistics sends the statistics; an objective's buffers, such as a queue, may differ between ranks.
# torch 2.13 renamed the option; delete the old name when torch >= 2.13 is required
_NAMES = inspect.signature(DistributedDataParallel.__init__).parameters
_LEAVE_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _NAMES else "broadcast_buffers": False
}


class DDPEngine(Engine):
    """See `Engine`. With one process this is a plain training step."""

    _replica: nn.Module | None = None
    _by_tensor: ByTensor | None = None

    def attach(self, model: nn.Module, attach_fn: Callable[..., Any], **options: Any) -> Any:
        if self.config.weights == "float32":
            return super().attach(model, attach_fn, **options)
        origin = hold_in_bf16(model, options)
        masks = super().attach(model, attach_fn, **options)
        masks.origin = origin
        InBf16(model, self.world.device)
        if self.config.scores == "bf16":
            for entry in masks.entries:
                entry.scores.data = entry.scores.data.to(torch.bfloat16)
        return masks

    def start(self, optimizer: Optimizer) -> None:
        super().start(optimizer)
        self._replicated = []  # DistributedDataParallel sums these too
        is_lean = self.config.weights == "bf16"
        if isinstance(optimizer, LeanSGD):
            optimizer.names = {id(one.tensor): name for name, one in self.trained.items()}
            optimizer.clock = lambda: self.masks_step
        if is_lean and (self.clip_norm is None or self.score_step == "rms"):  # else a norm needs all at once
            self._by_tensor = ByTensor(
                self.masks.values(),
                optimizer,
                in_backward=self.world.size == 1 and self.accumulate == 1 and self.score_step == "plain",
                is_rms=self.score_step == "rms",
            )
        if self.world.size > 1 and any(parameter.requires_grad for parameter in self.module.parameters()):
            self._replica = DistributedDataParallel(
                self.module,
                device_ids=[self.world.device] if self.world.device.type == "cuda" else None,
                # gradients lie in the buckets that are sent; it changes the order of sums, and the float32
                # mode keeps its own
                gradient_as_bucket_view=is_lean,
                **_LEAVE_BUFFERS,
            )

    @property
    def loss_factor(self) -> float:
        return float(self.world.size)

    def step(self) -> None:
        if self._by_tensor is not None:
            self._by_tensor.finish()
        super().step()

    def _begin_micro_batch(self, *, is_last: bool) -> None:
        if isinstance(self._replica, DistributedDataParallel):
            self._replica.require_backward_grad_sync = is_last  # what its no_sync() sets

    def _forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = (self._replica or self.module)(batch)
        return loss, metrics

    def _backward(self, loss: Tensor) -> None:
        if self._by_tensor is None:
            (loss * self.loss_factor).backward()
            return
        with self._by_tensor.during(loss):
            (loss * self.loss_factor).backward()

    def _finish_backward(self) -> None:
        if self._by_tensor is None:
            super()._finish_backward()
