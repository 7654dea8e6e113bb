"""What can be read of the masks on one model, in whichever way they are trained.

Knows nothing of files, process groups or optimizers.
"""

from collections.abc import Iterator, Sequence
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from selfmask_dist.masking import core, selection
from selfmask_dist.masking.families.base import Family
from selfmask_dist.masking.passes import look
from selfmask_dist.masking.segment import Segment
from selfmask_dist.masking.shards import Shards


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
        self._statistics = {name: buffer.clone() for name, buffer in norm_statistics(model)}

    @property
    def threshold(self) -> float:
        return self.family.options.threshold

    @property
    def scale(self) -> core.Scale:
        return self.family.options.scale

    def parameters(self) -> Iterator[nn.Parameter]:
        """The scores, in the model's parameter order: float32, each the shape of its theta; and what small
        numbers a family trains beside them. Nothing where a family's masks are fixed.
        """
        for entry in self.entries:
            if entry.scores.requires_grad:
                yield entry.scores
            if entry.numbers is not None:
                yield entry.numbers

    def weight_parameters(self) -> Iterator[nn.Parameter]:
        """The weights under the masks, where the family trains them."""
        for entry in self.entries:
            if isinstance(entry.weight, nn.Parameter) and entry.weight.requires_grad:
                yield entry.weight

    @torch.no_grad()
    def state_dict(self) -> dict[str, Tensor]:
        """The scores, {parameter name: tensor of its shape}: all there is to save of a mask in training.

        Collective under `shards`: every rank must call.
        """
        return {entry.name: self.shards.whole(entry.name, entry.scores).detach() for entry in self.entries}

    @torch.no_grad()
    def masks(self) -> dict[str, Tensor]:
        """The masks, {parameter name: bool tensor of its shape}. Collective under `shards`."""
        pieces = self.mask_pieces()
        if self.shards.is_whole:
            return pieces
        dtype = self.entries[0].scores.dtype  # not all collectives take bools
        return {name: self.shards.whole(name, piece.to(dtype)).bool() for name, piece in pieces.items()}

    @torch.no_grad()
    def mask_pieces(self) -> dict[str, Tensor]:
        """What this process holds of the masks, {parameter name: bool tensor}. Collective under `shards`."""
        segments = [entry.segments() for entry in self.entries]
        look(self.family, [segment for parts in segments for segment in parts], self.shards, self.step)
        masks = ([self.family.mask(segment) for segment in parts] for parts in segments)
        return {
            entry.name: parts[0] if len(parts) == 1 else torch.cat(parts)
            for entry, parts in zip(self.entries, masks, strict=True)
        }

    @torch.no_grad()
    def weights(self) -> dict[str, Tensor]:
        """The weights under the masks, {parameter name: tensor}. Collective under `shards`."""
        return {entry.name: self._whole_weight(entry) for entry in self.entries}

    @torch.no_grad()
    def first_weights(self) -> dict[str, Tensor]:
        """The weights as they were before training, {parameter name: tensor}. Collective under `shards`."""
        if not self.family.trains_weight:
            return self.weights()
        pieces = ((entry, entry.first_weight.to(entry.weight.device)) for entry in self.entries)
        return {entry.name: self.shards.whole(entry.name, piece) for entry, piece in pieces}

    @torch.no_grad()
    def thetas(self) -> dict[str, Tensor]:
        """The effective weights, {parameter name: tensor}. Collective under `shards`."""
        return {
            entry.name: self.shards.whole_weight(entry.name, entry.theta).detach() for entry in self.entries
        }

    def sparsity(self) -> dict[str, float]:
        """The share of pruned weights per parameter, {name: 0 ... 1}. Collective under `shards`."""
        return {name: 1 - mask.double().mean().item() for name, mask in self.masks().items()}

    def _whole_weight(self, entry: E) -> Tensor:
        read = self.shards.whole if self.family.trains_weight else self.shards.whole_weight
        return read(entry.name, entry.weight).detach()

    def moved_statistics(self) -> dict[str, Tensor]:
        """Running statistics of normalisation layers that differ from those at attach time."""
        return {
            name: buffer.detach().clone()
            for name, buffer in norm_statistics(self._model)
            if not torch.equal(buffer, self._statistics[name].to(buffer.device))
        }


def norm_statistics(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers of normalisation layers, by name."""
    for module_name, module in model.named_modules():
        if selection.is_norm(module):
            for name, buffer in module.named_buffers(recurse=False):
                yield f"{module_name}.{name}" if module_name else name, buffer
