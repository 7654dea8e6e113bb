"""A frozen backbone under a mask, and a head: images in, logits out.

    logits = head(encoder(images))        without a head: embeddings

`Loaded` is what `load` returns: the model with what turns pictures into images and rows into class names.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from selfmask_dist.cascade.model import Cascade
from selfmask_dist.maskfile import Head
from selfmask_dist.models.pictures import PictureTransform

Picture = str | Path | bytes | Image.Image


class WholeModel(nn.Module):
    """Images (n, 3, H, W) to logits (n, classes), or to embeddings (n, dim) where there is no head.

    Args:
        encoder: images -> features (n, dim).
        head: None where none is known.
    """

    def __init__(self, encoder: nn.Module, head: Head | None) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.eval()

    def embed(self, images: Tensor) -> Tensor:
        """Return the embeddings (n, dim), float32, of images (n, 3, H, W) on the encoder's device."""
        features: Tensor = self.encoder(images)
        return features.float()

    def forward(self, images: Tensor) -> Tensor:
        features = self.embed(images)
        if self.head is None:
            return features
        if self.head.weight.device != features.device:
            self.head = self.head.to(features.device)
        return self.head.logits(features)


class CascadeEncoder(nn.Module):
    """A cascade in one of its modes, as an encoder.

    Its masks are put on and off in `forward`, so that the backbone is no submodule: it must not be moved.
    """

    def __init__(self, cascade: Cascade, mode: str) -> None:
        super().__init__()
        self.cascade, self.mode = cascade, mode

    def forward(self, images: Tensor) -> Tensor:
        return self.cascade.embed(images, mode=self.mode).float()


@dataclass(frozen=True)
class Prediction:
    """The most likely classes of one picture, best first.

    picture: what was given, as text. indices, classes, probabilities, logits: one each for a class.
    target: what the head gives, as of `maskfile.Head`. With multilabel each probability is by itself; with
        regression the classes are the names of numbers, in their order, which stand in `logits`, and there
        are no probabilities.
    """

    picture: str
    indices: tuple[int, ...]
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]
    logits: tuple[float, ...]
    target: str = "class"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        if self.target == "regression":
            numbers = dict(zip(self.classes, self.logits, strict=True))
            return {"picture": self.picture, "values": numbers}
        rows = zip(self.classes, self.indices, self.probabilities, self.logits, strict=True)
        return {
            "picture": self.picture,
            "top": [
                {"class": name, "index": index, "probability": probability, "logit": logit}
                for name, index, probability, logit in rows
            ],
        }


@dataclass(frozen=True)
class Loaded:
    """What `load` returns; `model, transform, classes = load(path)` takes it apart.

    model: a `WholeModel` in eval mode. transform: picture -> tensor (3, size, size). classes: a name for each
    logit; empty without a head. device: of the model. name: what was loaded. metrics, licence, provenance: as
    the file has them.
    """

    model: WholeModel
    transform: PictureTransform
    classes: tuple[str, ...]
    device: torch.device
    name: str
    metrics: dict[str, float] = field(default_factory=dict)
    licence: str = ""
    provenance: dict[str, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.transform, self.classes))

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Return logits (n, classes) of images (n, 3, H, W), or embeddings where there is no head."""
        found: Tensor = self.model(images.to(self.device))
        return found

    def predict(self, pictures: Sequence[Picture], *, top: int = 1, batch_size: int = 32) -> list[Prediction]:
        """Return the classes of pictures, in their order; see `predict_each`."""
        return list(self.predict_each(pictures, top=top, batch_size=batch_size))

    def predict_each(
        self, pictures: Sequence[Picture], *, top: int = 1, batch_size: int = 32
    ) -> Iterator[Prediction]:
        """Yield the most likely classes of each picture, as batches are done.

        Args:
            pictures: paths, encoded bytes, or PIL's pictures.
            top: how many classes of each; all of them where there are fewer. Of a regression every number is
                given.
            batch_size: pictures that go through the encoder together.

        Raises:
            ValueError: there is no head, or one of patches (objective.target=dense), or a picture cannot be
                read, which the message names.
        """
        if self.model.head is None:
            raise ValueError(
                f"{self.name} has no head, so that it has embeddings and no classes; train with "
                "objective.name=supervised, or use model.embed(images)"
            )
        if self.model.head.target == "dense":
            raise ValueError(
                f"the head of {self.name} is of patches (objective.target=dense), so that a picture has a "
                "map and no one answer; ask model(images), which gives logits (n, rows, columns, classes)"
            )
        if isinstance(pictures, str | Path | bytes | Image.Image):
            raise TypeError("predict takes a list of pictures; write predict([picture])")
        if top < 1 or batch_size < 1:
            raise ValueError(f"top={top} and batch_size={batch_size}; both must be at least 1")
        for start in range(0, len(pictures), batch_size):
            batch = pictures[start : start + batch_size]
            logits = self(torch.stack([self.transform(picture) for picture in batch])).cpu()
            for picture, row in zip(batch, logits, strict=True):
                yield ranked(_text(picture), row, self.classes, top, target=self.model.head.target)


def ranked(
    picture: str, logits: Tensor, classes: Sequence[str], top: int, *, target: str = "class"
) -> Prediction:
    """Return the `top` largest of the logits (classes,) with their names; ties in the classes' order.

    Args:
        target: what the logits stand for; see `maskfile.Head`.
    """
    if target == "regression":
        numbers = tuple(logits.tolist())
        return Prediction(picture, tuple(range(len(numbers))), tuple(classes), (), numbers, target)
    order = logits.sort(descending=True, stable=True).indices[:top]
    wide = logits.double()
    probabilities = (wide.sigmoid() if target == "multilabel" else wide.softmax(dim=0))[order]
    indices = order.tolist()
    return Prediction(
        picture,
        tuple(indices),
        tuple(classes[index] for index in indices),
        tuple(probabilities.tolist()),
        tuple(logits[order].tolist()),
        target,
    )


def _text(picture: Picture) -> str:
    return str(picture) if isinstance(picture, str | Path) else f"<{type(picture).__name__}>"
