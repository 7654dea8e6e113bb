"""A finished supervised run as a teacher: images to logits, frozen, for distillation.

    teacher = DistillTeacher(Path("runs/finetuned"), classes)
    logits = teacher(images)

Reads the run's own configuration, its weights or mask, and its head. Wiring alone.
"""

from pathlib import Path

import torch
from torch import Tensor

from selfmask_dist import objectives
from selfmask_dist.training.build import build_backbone, build_objective
from selfmask_dist.training.saving import read_outcome


class DistillTeacher:
    """See the module's docstring. It is no module, so that no optimizer, engine or checkpoint finds it.

    Args:
        run: folder of a run with a linear, masked or CLIP head.
        classes: those of the student.

    Raises:
        ValueError: there is no such run, it has not ended, or it tells other classes apart.
    """

    def __init__(self, run: Path, classes: tuple[str, ...]) -> None:
        outcome = read_outcome(run)
        if outcome.mask is None and outcome.weights is None:
            raise ValueError(f"objective.distill_from: {run} holds no finished run; name the folder of one")
        config = outcome.config(["objective.distill_from=null"])
        if config.objective.name != "supervised":
            raise ValueError(
                f"objective.distill_from: {run} was trained by {config.objective.name}, which tells no "
                "classes apart; name a supervised run"
            )
        backbone = build_backbone(config)
        outcome.put_on(backbone.encoder)
        self._encoder = backbone.encoder.requires_grad_(False).eval()
        self._objective = build_objective(config, backbone, classes, objectives.Context(), steps_per_epoch=1)
        if outcome.head is not None:
            try:
                self._objective.load_state_dict(outcome.head_state())
            except RuntimeError as error:  # torch's, with all keys and shapes
                raise ValueError(
                    f"objective.distill_from: the head of {run} is not one for {len(classes)} classes: "
                    f"{error}"
                ) from error
        self._objective.requires_grad_(False).eval()
        self._device = torch.device("cpu")

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return logits (n, classes) of images (n, 3, H, W), on their device."""
        if images.device != self._device:
            self._device = images.device
            self._encoder.to(self._device)
            self._objective.to(self._device)
        return self._objective.predict(self._encoder, images)
