"""What an objective is: a module that turns an encoder and a batch into this rank's share of the loss.

    loss of a rank = (sum over its rows of weight_i * loss_i) / (samples in the global batch)

so the sum over ranks is the mean over the global batch, however it was dealt. Knows neither optimizers nor
process groups.
"""

import hashlib

import torch
from torch import Tensor, nn

from selfmask_dist.data import Batch


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

    def predict(self, encoder: nn.Module, images: Tensor) -> Tensor:
        """Class logits (n, classes) of images (n, 3, H, W), where the objective classifies."""
        raise NotImplementedError(f"{type(self).__name__} does not classify")


def named_generator(seed: int, purpose: str) -> torch.Generator:
    """A CPU generator seeded by (seed, purpose) alone, so heads are the same on every rank and device."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
