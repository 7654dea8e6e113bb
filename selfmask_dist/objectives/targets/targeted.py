"""What the targets beside one class have in common: the supervised head, a loss for each row, two metrics."""

from torch import Tensor, nn

from selfmask_dist.data import Batch, TargetSummary
from selfmask_dist.objectives.supervised import Supervised


class Targeted(Supervised):
    """A supervised objective whose batches hold `targets`; see `Supervised` for its head.

    measure: the name of its metric beside `loss`.
    """

    fewest = 1
    measure: str

    def know(self, summary: TargetSummary) -> None:
        """Take what the training data says ahead of training; by default nothing of it is of use."""

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each row, (n,), of the head's outputs and a batch's targets."""
        raise NotImplementedError

    def measured(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the metric of each row, (n,)."""
        raise NotImplementedError

    def answer(self, outputs: Tensor) -> Tensor:
        """Return what `predict` gives of the head's outputs; by default the logits."""
        return outputs

    def forward(self, encoder: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """As `Objective.forward`; rows of weight 0 have no influence, whatever their targets."""
        assert len(batch.views) == 1, len(batch.views)
        assert batch.targets is not None, "the loader was not asked for targets"
        outputs = self._classify(encoder(batch.views[0]), batch.weights)
        is_float = batch.targets.is_floating_point()
        targets = batch.targets.to(outputs.dtype) if is_float else batch.targets
        loss = (batch.weights * self.losses(outputs, targets)).sum() / batch.global_count
        found = (batch.weights * self.measured(outputs.detach(), targets)).sum() / batch.global_count
        return loss, {"loss": loss.detach(), self.measure: found}

    def predict(self, encoder: nn.Module, images: Tensor) -> Tensor:
        return self.answer(self._classify(encoder(images), None))
