"""A finished supervised run as a teacher: images to logits, frozen, for distillation.

    teacher = Teacher(Path("runs/finetuned"), classes)
    logits = teacher(images)

Reads the run's own configuration, its weights or mask, and its head. Wiring alone.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from selfmask_dist import objectives
from selfmask_dist.config import load_config
from selfmask_dist.maskfile.api import apply_masks
from selfmask_dist.training import build


class Teacher:
    """See the module's docstring. Not a module, so that no optimizer, engine or checkpoint finds it.

    Args:
        run: folder of a run with a linear, masked or CLIP head.
        classes: those of the student.

    Raises:
        ValueError: there is no such run, it has not ended, or it tells other classes apart.
    """

    def __init__(self, run: Path, classes: tuple[str, ...]) -> None:
        weights, mask, head = (
            run / name for name in ("encoder.safetensors", "final.mask", "head.safetensors")
        )
        if not (run / "config.yaml").exists() or not (weights.exists() or mask.exists()):
            raise ValueError(f"objective.distill_from: {run} holds no finished run; name the folder of one")
        config = load_config(run / "config.yaml", ["objective.distill_from=null"])
        if config.objective.name != "supervised":
            raise ValueError(
                f"objective.distill_from: {run} was trained by {config.objective.name}, which tells no "
                "classes apart; name a supervised run"
            )
        backbone = build.build_backbone(config)
        if weights.exists():
            backbone.encoder.load_state_dict(load_file(weights))
        else:
            apply_masks(backbone.encoder, mask)
        self._encoder = backbone.encoder.requires_grad_(False).eval()
        self._objective = build.build_objective(
            config, backbone, classes, objectives.Context(), steps_per_epoch=1
        )
        if head.exists():
            try:
                self._objective.load_state_dict(load_file(head))
            except RuntimeError as error:  # torch's, with all keys and shapes
                raise ValueError(
                    f"objective.distill_from: the head of {run} is not one for {len(classes)} classes: "
                    f"{error}"
                ) from error
        self._objective.requires_grad_(False).eval()
        self._device = torch.device("cpu")

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits (n, classes) of images (n, 3, H, W), on their device."""
        if images.device != self._device:
            self._device = images.device
            self._encoder.to(self._device)
            self._objective.to(self._device)
        return self._objective.predict(self._encoder, images)
