"""What can be read of the masks on one model, in whichever way they are trained.

`MaskSet` has the tensors, `measure` a few numbers for a log:

    active   = sum M / N
    flips    = share of mask bits that differ between two moments
    near     = share of scores with |S - mu| <= band (of families that rank: from the last one kept)

Knows nothing of files, loggers, process groups or optimizers.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from selfmask_dist.common.fingerprint import digest
from selfmask_dist.common.tensor_names import renamed
from selfmask_dist.masking import checks, core, marks, selection
from selfmask_dist.masking.families.base import Family
from selfmask_dist.masking.passes import measure_and_rank
from selfmask_dist.masking.pieces import Segment, Shards

_HALVES = (torch.float16, torch.bfloat16)
# of a state dict, beside the names of parameters, in which there is no colon
STEP = ":step"
FINGERPRINT = ":fingerprint"


class Entry(Protocol):
    """One parameter under a mask."""

    name: str
    scores: nn.Parameter
    num_segments: int
    numbers: nn.Parameter | None

    @property
    def theta(self) -> Tensor: ...
    @property
    def weight(self) -> Tensor: ...
    @property
    def first_weight(self) -> Tensor: ...
    def piece(self, tensor: Tensor) -> Tensor: ...
    def segments(self) -> list[Segment]: ...


E = TypeVar("E", bound=Entry)


class MaskSet(Generic[E]):
    """The masks on one model; `shards` tells how this process's tensors relate to whole ones.

    step: steps of the optimizer that are done, which a family's schedule follows.
    """

    def __init__(self, model: nn.Module, entries: Sequence[E], *, family: Family, shards: Shards) -> None:
        self.family = family
        self.entries = list(entries)
        self.shards = shards
        self.step = 0
        self._model = model
        self._hashed: str | None = None
        self.origin: str | None = None  # fingerprint of the weights as they came, where they were rounded
        marks.keep_buffers(model, self)

    @property
    def threshold(self) -> float:
        """Return mu, above which scores are kept by families that compare with a threshold."""
        return self.family.options.threshold

    @property
    def scale(self) -> core.Scale:
        """Return how the scale a of theta = a * W * M takes part; see `core`."""
        return self.family.options.scale

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the scores in the model's parameter order: float32, each of the shape of its theta.

        After each come the small numbers that a family trains beside them. Nothing where masks are fixed.
        """
        for entry in self.entries:
            if entry.scores.requires_grad:
                yield entry.scores
            if entry.numbers is not None:
                yield entry.numbers

    def weight_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the weights under the masks, where the family trains them."""
        for entry in self.entries:
            if isinstance(entry.weight, nn.Parameter) and entry.weight.requires_grad:
                yield entry.weight

    @torch.no_grad()
    def state_dict(self) -> dict[str, Tensor]:
        """Return the scores, {name: tensor of its shape}: all that a mask in training has to save.

        Families that train more have `name:weight` (its shape) and `name:numbers` (segments, numbers) too.
        `:step` is the number of steps done (0-d), `:fingerprint` says which weights the scores are for (32
        bytes). Collective under `shards`: every rank must call.
        """
        own = torch.frombuffer(bytearray.fromhex(self._fingerprint()), dtype=torch.uint8)
        state = {entry.name: self.shards.whole(entry.name, entry.scores).detach() for entry in self.entries}
        for entry in self.entries:
            if self.family.trains_weight:
                state[f"{entry.name}:weight"] = self.shards.whole(entry.name, entry.weight).detach()
            if entry.numbers is not None:
                state[f"{entry.name}:numbers"] = entry.numbers.detach()
        return state | {STEP: torch.tensor(self.step), FINGERPRINT: own}

    def _fingerprint(self) -> str:
        """Return the fingerprint of the weights before training; hashed once. Collective under `shards`."""
        if self._hashed is None:
            entries = sorted(self.entries, key=lambda entry: entry.name)
            # one at a time: no rank ever holds all of them
            self._hashed = digest((entry.name, self.whole_first_weight(entry)) for entry in entries)
        return self._hashed

    @torch.no_grad()
    def check_weights(self, state: Mapping[str, Tensor]) -> None:
        """Check that a state's scores are for the weights under these masks. Collective under `shards`.

        Args:
            state: what `state_dict` gave, by whatever names; a state without a fingerprint always passes.

        Raises:
            ValueError: they are for others; the message says what was loaded in which order.
        """
        if FINGERPRINT not in state:
            return
        names = [key for key in state if ":" not in key]
        new_names = renamed(names, [entry.name for entry in self.entries])
        expected = bytes(state[FINGERPRINT].to("cpu", torch.uint8).tolist()).hex()
        is_same = all(name == new_name for name, new_name in new_names.items())
        if is_same and self._fingerprint() == expected:
            return
        weights = self.first_weights()
        own = sorted((name, weights[new_names[name]]) for name in names)
        found = self._fingerprint() if is_same else digest(own)
        halves = {str(half): digest((n, w.to(half)) for n, w in own) for half in _HALVES if found != expected}
        if expected not in halves.values():
            scores = {name: state[name].to(weight.device) for name, weight in own}
            pruned = {name: (weight, ~(scores[name] > self.threshold)) for name, weight in own}
            checks.check_same_weights(found, expected, pruned)

    @torch.no_grad()
    def masks(self) -> dict[str, Tensor]:
        """Return the masks, {parameter name: bool tensor of its shape}. Collective under `shards`."""
        return {name: self.whole_mask(name, piece) for name, piece in self.each_mask_piece()}

    @torch.no_grad()
    def whole_mask(self, name: str, piece: Tensor) -> Tensor:
        """Return the whole mask of a parameter, bool, by this process's piece. Collective under `shards`."""
        if self.shards.is_whole:
            return piece
        dtype = self.entries[0].scores.dtype  # not all collectives take bools
        return self.shards.whole(name, piece.to(dtype)).bool()

    def mask_pieces(self) -> dict[str, Tensor]:
        """Return this process's piece of each mask, {name: bool tensor}. Collective under `shards`."""
        return dict(self.each_mask_piece())

    @torch.no_grad()
    def each_mask_piece(self) -> Iterator[tuple[str, Tensor]]:
        """Yield name and piece (bool) of one mask after the other, in the order of entries. Collective."""
        yield from self._pieces_of(self.entries)

    def _pieces_of(self, entries: Sequence[E]) -> Iterator[tuple[str, Tensor]]:
        """Yield the pieces of masks that are measured and ranked together."""
        segments = [entry.segments() for entry in entries]
        measure_and_rank(
            self.family, [segment for parts in segments for segment in parts], self.shards, self.step
        )
        for entry, parts in zip(entries, segments, strict=True):
            masks = [self.family.mask(segment) for segment in parts]
            yield entry.name, masks[0] if len(masks) == 1 else torch.cat(masks)

    @torch.no_grad()
    def weights(self) -> dict[str, Tensor]:
        """Return the weights under the masks, {parameter name: tensor}. Collective under `shards`."""
        return {entry.name: self._whole_weight(entry) for entry in self.entries}

    @torch.no_grad()
    def first_weights(self) -> dict[str, Tensor]:
        """Return the weights before training, {parameter name: tensor}. Collective under `shards`."""
        return {entry.name: self.whole_first_weight(entry) for entry in self.entries}

    @torch.no_grad()
    def whole_first_weight(self, entry: E) -> Tensor:
        """Return the whole weight of one entry before training. Collective under `shards`."""
        if not self.family.trains_weight:
            return self._whole_weight(entry)
        return self.shards.whole(entry.name, entry.first_weight.to(entry.weight.device))

    @torch.no_grad()
    def thetas(self) -> dict[str, Tensor]:
        """Return the effective weights, {parameter name: tensor}. Collective under `shards`."""
        return {entry.name: self.whole_theta(entry) for entry in self.entries}

    @torch.no_grad()
    def whole_theta(self, entry: E) -> Tensor:
        """Return the whole effective weight of one entry. Collective under `shards`."""
        return self.shards.whole_weight(entry.name, entry.theta).detach()

    def sparsity(self) -> dict[str, float]:
        """Return the share of pruned weights per parameter, {name: 0 ... 1}. Collective under `shards`."""
        return {
            name: 1 - self.whole_mask(name, piece).double().mean().item()
            for name, piece in self.each_mask_piece()
        }

    def _whole_weight(self, entry: E) -> Tensor:
        read = self.shards.whole if self.family.trains_weight else self.shards.whole_weight
        return read(entry.name, entry.weight).detach()

    def moved_statistics(self) -> dict[str, Tensor]:
        """Return the running statistics of normalisation layers that differ from the pretrained ones.

        Those are of the moment when masks were attached, or earlier masks that are attached still.
        """
        found = {}
        for name, buffer in norm_statistics(self._model):
            owner, _, attribute = name.rpartition(".")
            before = marks.buffer_before(self._model.get_submodule(owner), attribute)
            if before is None or not torch.equal(buffer, before.to(buffer.device)):
                found[name] = buffer.detach().clone()
        return found

    def check_current(self) -> None:
        """Raise a ValueError where the scores are not what training made of them; here they always are."""


def norm_statistics(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers of normalisation layers, by name."""
    for module_name, module in model.named_modules():
        if selection.is_norm(module):
            for name, buffer in module.named_buffers(recurse=False):
                yield f"{module_name}.{name}" if module_name else name, buffer


@dataclass(frozen=True)
class MaskStatistics:
    """Shares between 0 and 1; `active` per parameter and over all, the others over all masked weights."""

    active: float
    active_by_parameter: dict[str, float]
    flips: float | None
    near_threshold: float
    num_nonfinite: int
    empty: tuple[str, ...]


@torch.no_grad()
def measure(
    masks: MaskSet[Any], *, before: dict[str, Tensor] | None = None, band: float = 0.1
) -> MaskStatistics:
    """Measure masks as they stand.

    Args:
        before: `masks.mask_pieces()` of an earlier moment, for the flips.
        band: half-width around the threshold, in units of a score (which starts at 1 by default).
    """
    now = masks.mask_pieces()
    sizes = [entry.theta.numel() for entry in masks.entries]
    scores = [entry.piece(entry.scores) for entry in masks.entries]
    near = [_near(entry.segments(), masks.family, band) for entry in masks.entries]
    flips = [(now[name] ^ before[name]).sum() for name in now] if before is not None else []
    nonfinite = torch.stack([_nonfinite(piece, masks.family) for piece in scores]).sum()
    counts = torch.stack([nonfinite, *(mask.sum() for mask in now.values()), *near, *flips])
    totals = masks.shards.sum(counts).tolist()  # one sync
    num, total = len(sizes), sum(sizes)
    num_nonfinite, *totals = totals
    kept = totals[:num]
    return MaskStatistics(
        active=sum(kept) / total,
        active_by_parameter={name: k / n for name, k, n in zip(now, kept, sizes, strict=True)},
        flips=sum(totals[2 * num :]) / total if before is not None else None,
        near_threshold=sum(totals[num : 2 * num]) / total,
        num_nonfinite=num_nonfinite,
        empty=tuple(name for name, k in zip(now, kept, strict=True) if k == 0),
    )


def _near(segments: Sequence[Segment], family: Family, band: float) -> Tensor:
    """Return how many of a piece's weights are near to being switched; 0 for families without a distance."""
    distances = [family.distance(segment) for segment in segments]
    near = [(distance.abs() <= band).sum() for distance in distances if distance is not None]
    return torch.stack(near).sum() if near else segments[0].scores.new_zeros((), dtype=torch.int64)


def _nonfinite(piece: Tensor, family: Family) -> Tensor:
    bad = ~piece.isfinite()
    if family.options.maskable < 1:
        bad &= ~piece.isposinf()  # what is always kept
    return bad.sum()
