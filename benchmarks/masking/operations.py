"""How many operations masks add to a step outside of forward and backward, and how often the device is read.

Counted by a dispatch mode on the meta device, where tensors have shapes and no values: the path is that of a
GPU, and any look at a value (`.item()`, `.tolist()`, `bool`) is an error there, so a count means that there
was none. Views and allocations start nothing on a device and are not counted. ViT-S/16 under masks, its
masks alone (no trainer, whose vote on loss and stop is one read a step), SGD with momentum by foreach.

    python -m benchmarks.masking.operations [--quick] --json
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import timm
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.harness import Benchmark
from selfmask_dist.masking import attach

# views, allocations and marks of the profiler
_NO_KERNEL = {"detach", "view", "_unsafe_view", "alias", "slice", "unbind", "split", "select", "expand"}
_NO_KERNEL |= {"t", "transpose", "permute", "unsqueeze", "as_strided", "empty", "empty_like", "empty_strided"}
_NO_KERNEL |= {"_to_copy", "_record_function_enter_new", "_record_function_exit"}


class Operations(TorchDispatchMode):
    """Counts the operations that start work on a device, by the part of a step that is set by `of`."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, Counter[str]] = {}
        self._part = "rest"

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Count under this name inside of `with`."""
        before, self._part = self._part, part
        try:
            yield
        finally:
            self._part = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name not in _NO_KERNEL:
            self.counts.setdefault(self._part, Counter())[name] += 1
        return func(*args, **(kwargs or {}))

    def total(self, part: str) -> int:
        """Return how many operations a part of the step started."""
        return sum(self.counts.get(part, Counter()).values())


def count(model: nn.Module, *, side: int, dtype: torch.dtype = torch.float32) -> tuple[Operations, int]:
    """Return what one step of `model` (on the meta device) under masks started, and how many tensors they are
    on.
    """
    model = model.to("meta", dtype).train()
    masks = attach(model, include="vit", auto=False)
    optimizer = torch.optim.SGD(masks.parameters(), lr=1.0, momentum=0.9, foreach=True)
    masks.bind(optimizer)
    operations = Operations()
    for _ in range(2):  # the first step makes the momentum
        operations.counts.clear()
        with operations:
            with operations.of("forward and backward"):
                model(torch.zeros(2, 3, side, side, device="meta", dtype=dtype)).sum().backward()
            with operations.of("pull back"):
                masks.pull_back(take=True)
            with operations.of("optimizer and rewriting"):
                optimizer.step()
            with operations.of("clear"):
                optimizer.zero_grad()
    return operations, len(masks.entries)


def main() -> int:
    bench = Benchmark("operations", __doc__)
    options = bench.parse()
    kwargs: dict[str, Any] = {"depth": 2} if options.quick else {}
    model = timm.create_model("vit_small_patch16_224", num_classes=0, img_size=64, **kwargs)
    operations, num_tensors = count(model, side=64)
    bench.figure("tensors under masks", num_tensors)
    outside = 0
    for part in ("pull back", "optimizer and rewriting", "clear"):
        outside += operations.total(part)
        bench.figure(f"operations, {part}", operations.total(part))
        bench.figure(f"most frequent, {part}", dict(operations.counts.get(part, Counter()).most_common(6)))
    bench.figure("operations outside forward and backward", outside)
    of_320 = outside / num_tensors * 320
    bench.figure("operations outside forward and backward, of 320 tensors", of_320, max=60)
    bench.figure("operations of forward and backward", operations.total("forward and backward"))
    bench.figure("values read by masks", 0)  # one would have been an error
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
