"""What an objective is: a module that turns an encoder and a batch into this rank's share of the loss.

    loss of a rank = (sum over its rows of weight_i * loss_i) / (samples in the global batch)

so the sum over ranks is the mean over the global batch, however it was dealt. Knows neither optimizers nor
process groups.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from selfmask_dist.data import Batch


@dataclass(frozen=True)
class Context:
    """What an objective may know of its run: this rank's place among the ranks that share a batch.

    all_reduce: sums a tensor over ranks, in place, and returns it.
    """

    rank: int = 0
    world_size: int = 1
    global_batch_size: int = 1
    all_reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor


class Objective(nn.Module):
    """A loss with the heads it trains. It neither holds the encoder nor says what of it is trained."""

    def forward(self, encoder: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """This rank's share of the loss, and of each metric.

        Returns:
            loss: 0-d, to be differentiated; metrics: 0-d, detached. Each sums over ranks to its global value.
        """
        raise NotImplementedError

    def head_parameters(self) -> list[nn.Parameter]:
        """The parameters that an optimizer trains as they are (no mask on them); none by default."""
        return []

    def start_step(self, step: int) -> None:
        """Called before each step, from 0; nothing by default."""

    def held_parameters(self) -> list[nn.Parameter]:
        """Head parameters that the coming optimizer step leaves as they are; none by default."""
        return []

    def unit_rows(self) -> list[nn.Parameter]:
        """Head parameters whose rows are put back to unit length after each step; none by default."""
        return []

    def whole_buffers(self) -> dict[str, Tensor]:
        """The buffers that are part of a run's state, the same on every rank.

        Collective: every rank must call.
        """
        return dict(self.named_buffers())

    def load_buffers(self, buffers: Mapping[str, Tensor]) -> None:
        """Take back what `whole_buffers` gave, perhaps at another number of ranks."""
        for name, buffer in self.named_buffers():
            buffer.copy_(buffers[name])

    def remarks(self, values: Mapping[str, float]) -> list[str]:
        """What the user should know about a logged step's metrics; usually nothing."""
        return []

    @property
    def classifies(self) -> bool:
        """Whether `predict` can be asked."""
        return type(self).predict is not Objective.predict

    def predict(self, encoder: nn.Module, images: Tensor) -> Tensor:
        """Class logits (n, classes) of images (n, 3, H, W), where the objective classifies."""
        raise NotImplementedError(f"{type(self).__name__} does not classify")
