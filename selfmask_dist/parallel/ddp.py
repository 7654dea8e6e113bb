"""The replicated engine: every rank holds everything, gradients are averaged by DistributedDataParallel.

Each rank's loss is its share of the global mean, so the global gradient is the sum over ranks;
DistributedDataParallel averages, hence the factor `world.size`. With gradients equal on all ranks, masks stay
equal on all ranks.
"""

import inspect
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from selfmask_dist.data import Batch
from selfmask_dist.parallel.engine import Engine

# NormStatistics sends the statistics; an objective's buffers, such as a queue, may differ between ranks.
# torch 2.13 renamed the option; delete the old name when torch >= 2.13 is required
_NAMES = inspect.signature(DistributedDataParallel.__init__).parameters
_LEAVE_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _NAMES else "broadcast_buffers": False
}


class DDPEngine(Engine):
    """See `Engine`. With one process this is a plain training step."""

    _replica: nn.Module | None = None

    def start(self, optimizer: Optimizer) -> None:
        super().start(optimizer)
        self._replicated = []  # DistributedDataParallel sums these too
        if self.world.size > 1 and any(parameter.requires_grad for parameter in self.module.parameters()):
            self._replica = DistributedDataParallel(
                self.module,
                device_ids=[self.world.device] if self.world.device.type == "cuda" else None,
                **_LEAVE_BUFFERS,
            )

    @property
    def loss_factor(self) -> float:
        return float(self.world.size)

    def _begin_micro_batch(self, *, is_last: bool) -> None:
        if isinstance(self._replica, DistributedDataParallel):
            self._replica.require_backward_grad_sync = is_last  # what its no_sync() sets

    def _forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = (self._replica or self.module)(batch)
        return loss, metrics

    def _backward(self, loss: Tensor) -> None:
        (loss * self.loss_factor).backward()
