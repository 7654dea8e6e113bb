"""Scores stepped one tensor after the other, so that their gradients never exist all at once.

    in backward     one process, one micro-step, plain steps: G of a tensor comes, becomes dL/dS in float32,
                    steps the scores, and both are gone before the next
    after backward  G of all tensors is there (bf16: 2 bytes a weight), dL/dS of one tensor at a time.
                    For several processes, whose G is summed first; for micro-steps; and for the score step
                    `rms`, which needs the largest of all gradients' sizes: dL/dS is made twice

Theta is rewritten after the last of them, by the hook of `Masks.bind`, as backward still reads it.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from selfmask_dist.masking import AttachedMasks, MaskedParameter, core
from selfmask_dist.masking.passes import Passes
from selfmask_dist.parallel.lean.sgd import LeanSGD


class ByTensor:
    """Steps the scores of some masks tensor by tensor.

    Args:
        in_backward: as soon as a tensor's gradient is there.
        is_rms: gradients are put to unit size (`score_step="rms"`).
    """

    def __init__(
        self,
        masks: Iterable[AttachedMasks],
        optimizer: Optimizer,
        *,
        in_backward: bool,
        is_rms: bool = False,
    ) -> None:
        assert not (in_backward and is_rms), "the largest of all sizes is known after backward"
        self._masks = [(one, Passes(one.family, one.shards)) for one in masks]
        self._is_rms = is_rms
        self._optimizer = optimizer
        self._groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        self._in_backward = in_backward
        self._is_open = False
        self._one = None if isinstance(optimizer, LeanSGD) else _OneTensor(optimizer)
        if in_backward:
            for one, passes in self._masks:
                for entry in one.entries:
                    entry.theta.register_post_accumulate_grad_hook(partial(self._come, passes, entry))

    @contextmanager
    def during(self, loss: Tensor) -> Iterator[None]:
        """Let tensors step within the backward of this loss, unless it is not finite.

        Gradients stay then, and whoever looks at the loss finds every score as it was. One look at it.
        """
        self._is_open = self._in_backward and bool(loss.detach().isfinite())
        try:
            yield
        finally:
            self._is_open = False

    @torch.no_grad()
    def finish(self) -> None:
        """Step the tensors that have not stepped within backward."""
        for masks, passes in self._masks:
            found = [entry for entry in masks.entries if entry.theta.grad is not None]
            factors: list[Tensor | None] = [None] * len(found)
            if self._is_rms and found:
                factors = list(_factors(passes, found).unbind())
            for entry, factor in zip(found, factors, strict=True):
                self._step(passes, entry, factor)

    def _come(self, passes: Passes, entry: MaskedParameter, _theta: Tensor) -> None:
        if self._is_open:
            with torch.no_grad():
                self._step(passes, entry, None)

    def _step(self, passes: Passes, entry: MaskedParameter, factor: Tensor | None) -> None:
        group = self._groups[id(entry.scores)]
        grad, entry.theta.grad = entry.theta.grad, None
        assert grad is not None
        if not group["lr"]:  # its time has not come, and it gathers no momentum either
            return
        found = passes.score_gradient(entry, grad)
        del grad
        if factor is not None:
            found.mul_(factor.to(found.dtype))
        if isinstance(self._optimizer, LeanSGD):
            self._optimizer.step_tensor(group, entry.scores, found)
        else:
            assert self._one is not None
            self._one.step(group, entry.scores, found)


def _factors(passes: Passes, entries: list[MaskedParameter]) -> Tensor:
    """Return what each tensor's gradient is to be multiplied by under the score step `rms`, 1-D float64."""
    squares, sizes = [], []
    for entry in entries:
        grad = entry.theta.grad
        assert grad is not None
        kept = grad if grad.dtype in core.HALVES else grad.clone()  # it is needed once more
        squares.append(core.sum_of_squares(passes.score_gradient(entry, kept)))
        sizes.append(entry.theta.numel())
    counts = torch.tensor(sizes, dtype=torch.float64, device=squares[0].device)
    return core.step_factors(torch.stack(squares) / counts)


class _OneTensor:
    """Any optimizer's step of a single tensor, with its own state: no hook of the optimizer runs."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        kind: Any = type(optimizer)
        self._copy = kind([nn.Parameter(torch.zeros(1))])  # its groups are never its own

    def step(self, group: dict[str, Any], parameter: nn.Parameter, grad: Tensor) -> None:
        self._copy.param_groups = [{**group, "params": [parameter]}]
        self._copy.state = self._optimizer.state
        parameter.grad = grad
        self._copy.step()
        parameter.grad = None
