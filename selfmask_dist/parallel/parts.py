"""What one process holds of a run's state: parts of named tensors, to be saved, read and gathered.

    TensorPart         consecutive elements of a tensor, flattened: rows of fsdp, ranges of bits, all of ddp
    StateSource        where such elements are read from: a checkpoint, or what is kept in memory
    TrainedParameter   a tensor that the optimizer holds, and which part of the whole one it is
    EngineState        all that is trained, whole

Flat in one dimension, every engine's cut is a range, so any engine at any world size reads what any other
left. Knows nothing of engines, optimizers or files.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from selfmask_dist.masking import Shards
from selfmask_dist.parallel.world import World

_T = TypeVar("_T")


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


# ---- what is trained


@dataclass(frozen=True)
class TrainedParameter:
    """One tensor that the optimizer holds, and how it relates to the whole one."""

    tensor: nn.Parameter
    name: str  # within the model that `shards` was made for
    shape: torch.Size  # of the whole tensor
    shards: Shards
    first_row: int = 0

    def piece(self, tensor: Tensor) -> Tensor:
        """Return this process's part of this parameter, or of a tensor cut like it; the storage is shared."""
        return self.shards.piece(self.name, tensor.detach())

    def part(self, name: str, tensor: Tensor, world: World) -> TensorPart:
        """Return this process's part of this parameter, or of a tensor cut like it, under `name`."""
        if not tensor.ndim and self.shape:  # a count: one number for the whole tensor
            return TensorPart(name, tensor.shape, tensor.detach(), copies=world.size, copy=world.rank)
        piece = self.piece(tensor)
        row = self.shape[1:].numel() if piece.ndim == len(self.shape) else 1  # else cut by elements
        return TensorPart(
            name,
            self.shape,
            piece,
            self.first_row * row,
            copies=world.size if self.shards.is_whole else self.shards.copies,
            copy=world.rank // self.shards.num_pieces,  # neighbouring ranks hold one copy together
        )


@dataclass(frozen=True)
class EngineState:
    """All that is trained, whole and on the CPU, by parameter name; nothing frozen is in it."""

    parameters: dict[str, Tensor]  # scores of masked parameters, heads (or weights) as they are
    momentum: dict[str, Tensor]  # SGD's, or AdamW's first moment
    statistics: dict[str, Tensor] = field(default_factory=dict)  # running ones of normalisation layers
    step: int = 0  # steps that masks have made, for schedules
    second_moment: dict[str, Tensor] = field(default_factory=dict)  # AdamW's
    num_updates: dict[str, Tensor] = field(default_factory=dict)  # AdamW's, 0-d each
    teacher: dict[str, Tensor] = field(default_factory=dict)  # moving averages, where an objective has one


# tensors by name; a part of a state is called part/name
PARTS = tuple(part.name for part in fields(EngineState) if part.name != "step")
# what torch's optimizers call the parts of an EngineState that are theirs
SGD_SLOTS = {"momentum": "momentum_buffer"}
ADAMW_SLOTS = {"momentum": "exp_avg", "second_moment": "exp_avg_sq", "num_updates": "step"}
MOMENTS = tuple(ADAMW_SLOTS)


def empty_moment(optimizer: Optimizer, part: str, parameter: nn.Parameter) -> Tensor:
    """Return where a part of an optimizer's state of one parameter is to be read into."""
    if part == "num_updates":
        return torch.zeros(())
    dtype_of = getattr(optimizer, "moment_dtype", None)  # of those that hold it otherwise: lean.sgd
    dtype = parameter.dtype if dtype_of is None else dtype_of(parameter)
    return torch.empty_like(parameter, dtype=dtype, requires_grad=False)


def by_part(named: Mapping[str, _T]) -> dict[str, dict[str, _T]]:
    """Return what is called part/name as name -> value for each part of an `EngineState`, no others."""
    found: dict[str, dict[str, _T]] = {part: {} for part in PARTS}
    for key, value in named.items():
        part, _, name = key.partition("/")
        if part in found:
            found[part][name] = value
    return found


def check_fits(found: Mapping[str, torch.Size], shapes: Mapping[str, torch.Size]) -> None:
    """Raise a ValueError where a state is not one of these parameters.

    Args:
        found: the shapes of the state's parameters, by name. shapes: of what is trained here.
    """
    missing, unknown = sorted(set(shapes) - set(found)), sorted(set(found) - set(shapes))
    if missing or unknown:
        raise ValueError(
            f"the state does not fit what is trained: missing {missing[:5]}, unknown {unknown[:5]}"
        )
    for name, shape in shapes.items():
        if found[name] != shape:
            raise ValueError(f"{name} has shape {tuple(found[name])} in the state and {tuple(shape)} here")
