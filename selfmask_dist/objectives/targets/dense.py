"""A class for each pixel: the head on each patch's vector, its logits enlarged to the picture's size.

    z = W norm(x_patch) + b, bilinearly to (H, W)
    loss = mean over counted pixels of CE(z_pixel, y_pixel)

A pixel of `IGNORED` is not counted; a picture of such pixels alone has a loss of 0.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from selfmask_dist.data.targets import IGNORED
from selfmask_dist.objectives.targets.targeted import Targeted


class Dense(Targeted):
    """Cross-entropy over pixels with label smoothing; metrics `loss` and `pixel_accuracy`.

    Its encoder gives one vector a patch, (n, rows, columns, dim); `predict` gives logits
    (n, classes, H, W) at the images' size.
    """

    fewest = 2
    measure = "pixel_accuracy"

    def _classify(self, features: Tensor, weights: Tensor | None) -> Tensor:
        if features.ndim != 4:
            raise ValueError(
                f"objective.target=dense needs an encoder that gives (n, rows, columns, dim), got "
                f"{tuple(features.shape)}; build it with load_backbone(..., dense=True)"
            )
        # weights are the batch's rows', and no norm that counts rows goes with patches
        return super()._classify(features.flatten(0, 2), None).unflatten(0, features.shape[:3])

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        smoothing = self.config.label_smoothing
        found = F.cross_entropy(
            enlarged(outputs, (targets.shape[-2], targets.shape[-1])),
            targets,
            ignore_index=IGNORED,
            reduction="none",
            label_smoothing=smoothing,
        )
        return _over_counted(found, targets)

    def measured(self, outputs: Tensor, targets: Tensor) -> Tensor:
        found = enlarged(outputs, (targets.shape[-2], targets.shape[-1])).argmax(dim=1)
        return _over_counted((found == targets).to(outputs.dtype), targets)

    def predict(self, encoder: nn.Module, images: Tensor) -> Tensor:
        outputs = self._classify(encoder(images), None)
        return enlarged(outputs, (images.shape[-2], images.shape[-1]))


def enlarged(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Return patches' logits (n, rows, columns, classes) as pixels' (n, classes, *size), bilinearly."""
    return F.interpolate(logits.permute(0, 3, 1, 2), size=size, mode="bilinear", align_corners=False)


def _over_counted(values: Tensor, targets: Tensor) -> Tensor:
    """Return the mean of values (n, H, W) over the pixels that count, (n,)."""
    is_counted = (targets != IGNORED).to(values.dtype)
    return (values * is_counted).sum(dim=(1, 2)) / is_counted.sum(dim=(1, 2)).clamp(min=1)
