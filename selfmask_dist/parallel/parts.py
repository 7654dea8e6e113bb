"""Parts of named tensors: what one process holds of a run's state, to be saved, read and gathered.

    TensorPart   consecutive elements of a tensor, flattened: rows of fsdp, ranges of bits, whole ones of ddp
    StateSource  where such elements are read from: a checkpoint, or what is kept in memory

Flat in one dimension, every engine's cut is a range, so any engine at any world size reads what any other
left. Knows nothing of engines, optimizers or files.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from selfmask_dist.parallel.world import World


@dataclass(frozen=True)
class TensorPart:
    """Consecutive elements of one named tensor that this process holds; zero of them where it has none.

    shape: of the whole tensor.
    tensor: the elements, of any shape, in the order of the flattened whole. It shares the storage of what it
        is a part of, so that reading into it loads.
    start: the place of the first one in the flattened whole.
    copies, copy: so many processes hold these elements, and this one is number `copy` among them.
    is_of_first: the copies may differ, and that of copy 0 counts.
    """

    name: str
    shape: torch.Size
    tensor: Tensor
    start: int = 0
    copies: int = 1
    copy: int = 0
    is_of_first: bool = False

    @property
    def stop(self) -> int:
        """The place behind the last element."""
        return self.start + self.tensor.numel()

    @torch.no_grad()
    def fill(self, first: int, values: Tensor) -> None:
        """Copy elements (n,) of the flattened whole, from number `first` on, to where they lie here."""
        low, high = max(first, self.start), min(first + len(values), self.stop)
        if low >= high:
            return
        chosen = values[low - first : high - first]
        if self.tensor.is_contiguous():
            self.tensor.detach().view(-1)[low - self.start : high - self.start].copy_(chosen)
            return
        flat = self.tensor.detach().reshape(-1)
        flat[low - self.start : high - self.start] = chosen
        self.tensor.detach().copy_(flat.view(self.tensor.shape))


class StateSource(Protocol):
    """Whole tensors by name, of which a process reads the elements that it needs."""

    @property
    def shapes(self) -> Mapping[str, torch.Size]: ...
    @property
    def dtypes(self) -> Mapping[str, torch.dtype]: ...
    def read_into(self, part: TensorPart) -> None: ...


@dataclass
class KeptParts:
    """A `StateSource` in memory: parts that were kept, whole tensors among them."""

    parts: Iterable[TensorPart]
    shapes: dict[str, torch.Size] = field(init=False)
    dtypes: dict[str, torch.dtype] = field(init=False)

    def __post_init__(self) -> None:
        self._of: dict[str, list[TensorPart]] = {}
        for part in self.parts:
            self._of.setdefault(part.name, []).append(part)
        self.shapes = {name: parts[0].shape for name, parts in self._of.items()}
        self.dtypes = {name: parts[0].tensor.dtype for name, parts in self._of.items()}

    def read_into(self, part: TensorPart) -> None:
        """Copy what was kept of these elements into a part."""
        found = 0
        for kept in self._of[part.name]:
            part.fill(kept.start, kept.tensor.detach().reshape(-1))
            found += max(min(kept.stop, part.stop) - max(kept.start, part.start), 0)
        assert found == part.tensor.numel(), (
            f"{part.name}: {found} of {part.tensor.numel()} elements are kept"
        )


def whole_parts(tensors: Mapping[str, Tensor], *, copies: int = 1, copy: int = 0) -> list[TensorPart]:
    """Return tensors that this process holds whole as parts; so do `copies` processes."""
    return [
        TensorPart(name, tensor.shape, tensor.detach(), copies=copies, copy=copy)
        for name, tensor in tensors.items()
    ]


def gather(parts: Sequence[TensorPart], world: World) -> dict[str, Tensor]:
    """Return the tensors of all ranks' parts, whole and on the CPU, by name.

    Collective: every rank must call, with parts of the same names in the same order.
    """
    named: dict[str, list[TensorPart]] = {}
    for part in parts:
        named.setdefault(part.name, []).append(part)
    found = {}
    for name, own in named.items():
        shape, dtype = own[0].shape, own[0].tensor.dtype
        whole = torch.zeros(shape.numel(), dtype=dtype, device=world.device)
        for part in own:
            if part.copy == 0:  # zero elsewhere, so the sum is exact
                whole[part.start : part.stop] = part.tensor.detach().reshape(-1).to(world.device)
        is_bool = dtype == torch.bool
        whole = world.sum(whole.to(torch.uint8) if is_bool else whole)
        found[name] = (whole.bool() if is_bool else whole).view(shape).cpu()
    return found
