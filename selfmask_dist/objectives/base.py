"""What an objective is: a module that turns an encoder and a batch into this rank's share of the loss.

    loss of a rank = (sum over its rows of weight_i * loss_i) / (samples in the global batch)

so the sum over ranks is the mean over the global batch, however it was dealt. Knows neither optimizers nor
process groups.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, Protocol, Self

import torch
from torch import Tensor, nn

from selfmask_dist.backbones import set_train_mode
from selfmask_dist.data import Batch, TargetSummary


@dataclass(frozen=True)
class Context:
    """What an objective may know of its run: its length, and this rank's place among the ranks that share
    a batch.

    all_reduce: sums a tensor over ranks, in place, and returns it.
    all_reduce_with_gradient: the sum over ranks as a new tensor; gradients that come back are summed as well.
    steps_per_epoch, num_steps: of the run; what a section gives in epochs follows the first, and a momentum
        that rises until the end follows the second.
    num_samples: pictures in the training data.
    targets: of the training data, where they are no labels.
    all_to_all: sends row r of a tensor (ranks, ...) to rank r, and returns the rows that ranks sent here.
    """

    rank: int = 0
    world_size: int = 1
    global_batch_size: int = 1
    all_reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor
    all_reduce_with_gradient: Callable[[Tensor], Tensor] = lambda tensor: tensor
    steps_per_epoch: int = 1
    num_steps: int = 1
    num_samples: int = 1
    all_to_all: Callable[[Tensor], Tensor] | None = None
    targets: TargetSummary | None = None

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows of all ranks, (rows, ...) of each -> (rows * ranks, ...).

        They come in the order of the global batch, of which ranks take rows in turn. The gradients that ranks
        have for a row are summed on the rank that it is from. Collective: every rank must call.
        """
        if self.world_size == 1:
            return rows
        whole = rows.new_zeros(len(rows) * self.world_size, *rows.shape[1:])
        whole[self.rank :: self.world_size] = rows
        return self.all_reduce_with_gradient(whole) if whole.requires_grad else self.all_reduce(whole)

    def in_order(self, rows: Tensor, num_rows: int) -> tuple[int, Tensor]:
        """Return (first, rows): consecutive ones of `num_rows` of which this rank holds r, r + W, ...

        Each row travels once; every rank has a block of about num_rows / W. Collective: every rank must call.
        """
        if self.world_size == 1:
            return 0, rows
        block = self._block(num_rows)
        dealt = self._exchange(
            _padded(rows, block).view(self.world_size, block // self.world_size, *rows.shape[1:])
        )
        first = min(self.rank * block, num_rows)
        return first, dealt.transpose(0, 1).reshape(block, *rows.shape[1:])[: num_rows - first]

    def dealt(self, rows: Tensor, num_rows: int) -> Tensor:
        """Return the rows r, r + W, ... of `num_rows` whose blocks the ranks hold: undoes `in_order`.

        Collective: every rank must call.
        """
        if self.world_size == 1:
            return rows
        block = self._block(num_rows)
        by_rank = _padded(rows, block).view(block // self.world_size, self.world_size, *rows.shape[1:])
        own = len(range(self.rank, num_rows, self.world_size))
        return self._exchange(by_rank.transpose(0, 1).contiguous()).flatten(0, 1)[:own]

    def _block(self, num_rows: int) -> int:
        # a multiple of W, so that every rank sends every other one as many rows
        return -(-num_rows // self.world_size**2) * self.world_size

    def _exchange(self, rows: Tensor) -> Tensor:
        assert self.all_to_all is not None, "a context of several ranks needs all_to_all for this"
        if rows.dtype != torch.bool:
            return self.all_to_all(rows)
        return self.all_to_all(rows.view(torch.uint8)).view(torch.bool)

    def own_columns(self, num_rows: int, device: torch.device) -> Tensor:
        """Return where this rank's rows lie in what `gather` returns: (num_rows,)."""
        return torch.arange(num_rows, device=device) * self.world_size + self.rank


@dataclass(frozen=True)
class BufferPart:
    """What this rank holds of a buffer: consecutive elements of the flattened whole, from `start` on.

    is_on_all: every rank holds all of it. shape: of the whole.
    """

    name: str
    shape: torch.Size
    tensor: Tensor
    start: int = 0
    is_on_all: bool = True


class MomentumTeacher(Protocol):
    """A slow copy of encoder and heads: t <- m t + (1 - m) s after each step, with m = `momentum`."""

    momentum: float

    def __call__(self) -> AbstractContextManager[None]:
        """Let encoder and heads compute as the teacher's inside the context. Collective: all ranks enter."""


def _padded(rows: Tensor, length: int) -> Tensor:
    padded = rows.new_zeros(length, *rows.shape[1:])
    padded[: len(rows)] = rows
    return padded


class NoTeacher:
    """Stands where there is no teacher: the student teaches itself, m = 0."""

    momentum = 0.0

    def __call__(self) -> AbstractContextManager[None]:
        return nullcontext()


class Objective(nn.Module):
    """A loss with the heads that it trains. It neither holds the encoder nor says what of it is trained.

    teacher: given by whoever trains, before the first step, where `teacher_parameters` asks for one.
    """

    teacher: MomentumTeacher = NoTeacher()
    # every buffer differs from its first value after a step, so a run keeps no copy of that to compare with
    buffers_all_change = False

    def forward(self, encoder: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return this rank's share of the loss, and of each metric.

        Returns:
            loss: 0-d, to be differentiated; metrics: 0-d, detached. Each sums over ranks to its global value.
        """
        raise NotImplementedError

    def head_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that the optimizer trains without a mask; none by default."""
        return []

    def start_step(self, step: int) -> None:
        """Take notice of the step that comes next, from 0; by default there is nothing to do."""

    def after_step(self) -> None:
        """Take notice that the optimizer has stepped; by default there is nothing to do. Collective."""

    def held_parameters(self) -> list[nn.Parameter]:
        """Return the head parameters that the coming optimizer step leaves as they are; none by default."""
        return []

    def unit_rows(self) -> list[nn.Parameter]:
        """Return the head parameters whose rows get unit length again after each step; none by default."""
        return []

    def teacher_parameters(self) -> list[nn.Parameter] | None:
        """Return the head parameters that a teacher averages beside the encoder's; None without a teacher."""
        return None

    def buffer_parts(self) -> list[BufferPart]:
        """Return what this rank holds of the buffers that are part of a run's state.

        Collective: every rank must call.
        """
        return [BufferPart(name, buffer.shape, buffer) for name, buffer in self.named_buffers()]

    def take_buffers(self, parts: Sequence[BufferPart]) -> None:
        """Take other values back, in parts as `buffer_parts` returns them here. Collective."""
        buffers = dict(self.named_buffers())
        for part in parts:
            if part.tensor is not buffers[part.name]:
                buffers[part.name].copy_(part.tensor)

    def remarks(self, values: Mapping[str, float]) -> list[str]:
        """Return what the user should know about a logged step's metrics; usually nothing."""
        return []

    def kept_state(self) -> dict[str, Tensor]:
        """Return what of the head is of use after training, by name: all of it where it classifies."""
        return self.state_dict() if self.classifies else {}

    @property
    def classifies(self) -> bool:
        """Say whether `predict` can be asked."""
        return type(self).predict is not Objective.predict

    def predict(self, encoder: nn.Module, images: Tensor) -> Tensor:
        """Return class logits (n, classes) of images (n, 3, H, W), where the objective classifies."""
        raise NotImplementedError(f"{type(self).__name__} does not classify")


class TooFewImagesError(ValueError):
    """A process has so few images in a micro-step that batch normalisation has nothing to normalise by."""


class TrainStep(nn.Module):
    """Batch -> (this rank's share of the loss, metrics): the module that an engine runs."""

    def __init__(
        self,
        encoder: nn.Module,
        objective: Objective,
        *,
        batchnorm: Literal["train", "sync", "frozen"],
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.objective = objective
        self.batchnorm = batchnorm
        self.train()

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if mode:
            set_train_mode(self.encoder, batchnorm="frozen" if self.batchnorm == "frozen" else "train")
        return self

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        try:
            loss, metrics = self.objective(self.encoder, batch)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise TooFewImagesError(
                f"batch normalisation in train mode has one value for each channel, which has no variance: "
                f"this process has {len(batch.ids)} image(s) in a micro-step. Raise train.global_batch_size, "
                f"use fewer processes or a smaller train.accumulate, or set backbone.batchnorm=frozen"
            ) from error
        return loss, metrics
