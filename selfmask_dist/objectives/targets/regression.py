"""Numbers of a picture, learned in units of their deviation over the training data.

    loss = 1/K sum_k  |z_k - (y_k - m_k) / s_k|^p      p: 2 for mse, 1 for l1
    answer = s z + m                                   m, s: mean and deviation of the training data

So quantities of any unit weigh the same, and optim.head_lr means the same for them. m and s are part of the
head, in head.safetensors and in the mask file.
"""

import torch
from torch import Tensor

from selfmask_dist.config.objectives import ObjectiveConfig
from selfmask_dist.data import TargetSummary
from selfmask_dist.objectives.supervised import L2_LENGTH
from selfmask_dist.objectives.targets.targeted import Targeted


class Regression(Targeted):
    """Squared or absolute error of standardised numbers; metrics `loss` and `absolute_error`, the mean one in
    the numbers' own units.

    Args:
        dim: length of the encoder's features.
        num_outputs: how many numbers there are of a picture.
        config, seed: as of `Supervised`.
    """

    measure = "absolute_error"
    # a squared error's curvature along the head is 2 s^2, cross-entropy's at most s^2 / 2: at half the length
    # the same optim.head_lr is stable
    length = L2_LENGTH / 2
    target_mean: Tensor
    target_deviation: Tensor

    def __init__(self, dim: int, num_outputs: int, config: ObjectiveConfig, *, seed: int = 0) -> None:
        super().__init__(dim, num_outputs, config, seed=seed)
        self.register_buffer("target_mean", torch.zeros(num_outputs))
        self.register_buffer("target_deviation", torch.ones(num_outputs))

    def know(self, summary: TargetSummary) -> None:
        """Take mean and deviation of the training data; a number that does not vary has a deviation of 1."""
        assert summary.mean is not None
        assert summary.deviation is not None
        self.target_mean.copy_(summary.mean)
        self.target_deviation.copy_(torch.where(summary.deviation > 0, summary.deviation, 1))

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        errors = outputs - (targets - self.target_mean) / self.target_deviation
        return (errors.square() if self.config.regression_loss == "mse" else errors.abs()).mean(dim=1)

    def measured(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (self.answer(outputs) - targets).abs().mean(dim=1)

    def answer(self, outputs: Tensor) -> Tensor:
        """Return numbers in their own units."""
        return outputs * self.target_deviation + self.target_mean
