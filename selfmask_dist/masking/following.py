"""When masks in anybody's training loop follow it: at the end of a backward, and within a step's closure.

Knows neither what follows nor kinds of optimizers.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor


class AfterBackward:
    """A hook on tensors whose gradients accumulate: `call` runs once, when the backward is at its end."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call
        self._is_queued = False

    def __call__(self, _tensor: Tensor) -> None:
        """Take note that a gradient was accumulated."""
        if not self._is_queued:
            self._is_queued = True
            _at_end_of_backward(self._queue_again)

    def _queue_again(self) -> None:
        # a second time: DistributedDataParallel writes its reduced gradients in a callback that may come
        # after ours
        _at_end_of_backward(self._run)

    def _run(self) -> None:
        self._is_queued = False
        self._call()


def _at_end_of_backward(callback: Callable[[], None]) -> None:
    torch.autograd.Variable._execution_engine.queue_callback(callback)


class Following(Protocol):
    """Masks whose theta can be rewritten from the scores."""

    @property
    def is_attached(self) -> bool: ...
    @property
    def is_trained(self) -> bool: ...
    def rewrite(self) -> None: ...


def follow_in_closure(
    masks: Following, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Return the arguments of an optimizer's step with a closure before which theta follows the scores.

    L-BFGS and others move what they train between several calls of it. None where there is no closure.

    Args:
        args: of the step; the first is the optimizer.
    """
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if closure is None or not masks.is_attached or not masks.is_trained:
        return None
    num_calls = 0

    def followed() -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls > 1:  # what was changed before the step is for the guard to judge
            masks.rewrite()
        return closure()

    if len(args) > 1:
        return (args[0], followed, *args[2:]), kwargs
    return args, {**kwargs, "closure": followed}
