"""Several labels a picture: for each class c a yes or no of its own, by the head's logit z_c.

    loss = 1/C sum_c  - w_c y_c log s(z_c) - (1 - y_c) log(1 - s(z_c))      s: the logistic function

w_c is 1, or with `objective.class_weights=balanced` the number of noes over that of yeses in the training
data, so that both sides of a class weigh the same.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from selfmask_dist.data import TargetSummary
from selfmask_dist.objectives.targets.targeted import Targeted


class Multilabel(Targeted):
    """Binary cross-entropy with logits, its mean over classes; metrics `loss` and `label_accuracy`, the share
    of classes that are told right.
    """

    measure = "label_accuracy"
    weight_of_yes: Tensor | None = None

    def know(self, summary: TargetSummary) -> None:
        """Take the share of the samples that are of each class, for balanced weights."""
        if self.config.class_weights != "balanced":
            return
        assert summary.mean is not None
        shares = summary.mean
        if lacking := [name for name, one in zip(summary.outputs, shares.tolist(), strict=True) if not one]:
            raise ValueError(
                f"objective.class_weights=balanced: no training image is of class {lacking[0]!r}, whose "
                "weight would be infinite; leave the class out, or set objective.class_weights=none"
            )
        # not part of the state: it follows from the data
        self.register_buffer("weight_of_yes", ((1 - shares) / shares).float(), persistent=False)

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        weight = None if self.weight_of_yes is None else self.weight_of_yes.to(outputs.dtype)
        return F.binary_cross_entropy_with_logits(outputs, targets, reduction="none", pos_weight=weight).mean(
            dim=1
        )

    def measured(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return ((outputs > 0) == (targets > 0.5)).to(outputs.dtype).mean(dim=1)


def probabilities(logits: Tensor) -> Tensor:
    """Return the probability of each class by itself, of logits (n, classes)."""
    return torch.sigmoid(logits)
