"""What can be read of the masks on one model, in whichever way they are trained.

Knows nothing of files, process groups or optimizers.
"""

from collections.abc import Iterator, Sequence
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from selfmask_dist.masking import core, selection
from selfmask_dist.masking.shards import Shards


class Entry(Protocol):
    """One parameter under a mask."""

    name: str
    scores: nn.Parameter
    num_segments: int

    @property
    def theta(self) -> Tensor: ...
    @property
    def weight(self) -> Tensor: ...


E = TypeVar("E", bound=Entry)


class MaskSet(Generic[E]):
    """The masks on one model; `shards` tells how this process's tensors relate to whole ones."""

    def __init__(
        self, model: nn.Module, entries: Sequence[E], *, threshold: float, scale: core.Scale, shards: Shards
    ) -> None:
        self.threshold = threshold
        self.scale: core.Scale = scale
        self.entries = list(entries)
        self.shards = shards
        self._model = model
        self._statistics = {name: buffer.clone() for name, buffer in norm_statistics(model)}

    def parameters(self) -> Iterator[nn.Parameter]:
        """The scores, in the model's parameter order: float32, each the shape of its theta."""
        return (entry.scores for entry in self.entries)

    @torch.no_grad()
    def state_dict(self) -> dict[str, Tensor]:
        """The scores, {parameter name: tensor of its shape}: all there is to save of a mask in training.

        Collective under `shards`: every rank must call.
        """
        return {entry.name: self.shards.whole(entry.name, entry.scores).detach() for entry in self.entries}

    @torch.no_grad()
    def masks(self) -> dict[str, Tensor]:
        """The masks, {parameter name: bool tensor of its shape}. Collective under `shards`."""
        return {name: core.binarize(scores, self.threshold) for name, scores in self.state_dict().items()}

    @torch.no_grad()
    def mask_pieces(self) -> dict[str, Tensor]:
        """What this process holds of the masks, {parameter name: bool tensor}."""
        return {
            entry.name: core.binarize(self.shards.piece(entry.name, entry.scores), self.threshold)
            for entry in self.entries
        }

    @torch.no_grad()
    def weights(self) -> dict[str, Tensor]:
        """The frozen weights under the masks, {parameter name: tensor}. Collective under `shards`."""
        return {entry.name: self.shards.whole_weight(entry.name, entry.weight) for entry in self.entries}

    def sparsity(self) -> dict[str, float]:
        """The share of pruned weights per parameter, {name: 0 ... 1}. Collective under `shards`."""
        return {name: 1 - mask.double().mean().item() for name, mask in self.masks().items()}

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
