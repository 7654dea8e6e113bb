"""The replicated engine: every rank holds everything, gradients are averaged by DistributedDataParallel.

Each rank's loss is its share of the global mean, so the global gradient is the sum over ranks;
DistributedDataParallel averages, hence the factor `world.size`. With gradients equal on all ranks, masks stay
equal on all ranks.
"""

from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from selfmask_dist.data import Batch
from selfmask_dist.parallel.world import World


class DDPEngine:
    """See `Engine`. With one process this is a plain training step.

    Args:
        module: batch -> (rank's share of the loss, metrics); masks are attached already.
        precision: `bf16` runs the forward under autocast; scores, weights and reductions stay float32.
        accumulate: micro-batches per step; the result does not depend on it (batch normalisation in train
            mode aside).
        clip_norm: largest L2 norm of the gradient of all trained parameters together; None for no clipping.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        world: World,
        *,
        precision: str = "float32",
        accumulate: int = 1,
        clip_norm: float | None = None,
    ) -> None:
        self.world = world
        self.optimizer = optimizer
        self.accumulate = accumulate
        self.clip_norm = clip_norm
        self._autocast = precision == "bf16"
        if world.size > 1 and any(parameter.requires_grad for parameter in module.parameters()):
            module = DistributedDataParallel(
                module, device_ids=[world.device] if world.device.type == "cuda" else None
            )
        self.module = module

    def forward_backward(self, batch: Batch) -> dict[str, Tensor]:
        metrics: dict[str, Tensor] = {}
        micro_batches = _split(batch, self.accumulate)
        for index, micro_batch in enumerate(micro_batches):
            is_last = index == len(micro_batches) - 1
            with self._no_sync() if not is_last else nullcontext():
                with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self._autocast):
                    loss, values = self.module(micro_batch.to(self.world.device))
                (loss * self.world.size).backward()
            for name, value in values.items():
                metrics[name] = metrics[name] + value if name in metrics else value
        return metrics

    def step(self) -> None:
        if self.clip_norm is not None:
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _no_sync(self):  # type: ignore[no-untyped-def]
        return self.module.no_sync() if isinstance(self.module, DistributedDataParallel) else nullcontext()


def _split(batch: Batch, parts: int) -> list[Batch]:
    """Micro-batches by rows; `global_count` stays the whole batch's, so that their losses add up."""
    if parts == 1:
        return [batch]
    views = zip(*(view.chunk(parts) for view in batch.views), strict=True)
    rows = zip(
        views, batch.labels.chunk(parts), batch.weights.chunk(parts), batch.ids.chunk(parts), strict=True
    )
    return [
        replace(batch, views=views, labels=labels, weights=weights, ids=ids)
        for views, labels, weights, ids in rows
    ]
