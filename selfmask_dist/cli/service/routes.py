"""Cascades as the service serves them: in one of their modes, with which expert a picture went to.

A cascade's file called `photos.mask` is served as `photos`, in its mode `conditional`, and as `photos/MODE`
in each of the others that it has. Its masks are in the bank as `photos/dispatcher`, `photos/expert-0`, ...
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from selfmask_dist.cascade.model import Cascade, Route, load_cascade
from selfmask_dist.common import names
from selfmask_dist.maskfile import Model
from selfmask_dist.maskfile.bank import MaskBank

DEFAULT = "conditional"


@dataclass(frozen=True)
class ServedCascade:
    """A cascade in one mode. masks: the names of its masks in the bank."""

    cascade: Cascade
    mode: str
    masks: tuple[str, ...]

    def embed(self, images: Tensor) -> tuple[Tensor, list[Route]]:
        """Return embeddings (n, dim) of images (n, 3, H, W), and each one's route."""
        return self.cascade.routed(images, mode=self.mode)

    def is_gone(self, bank: MaskBank) -> bool:
        """Return whether one of its masks was removed."""
        return any(mask not in bank for mask in self.masks)

    def about(self) -> dict[str, object]:
        """Return what `GET /masks` says of it."""
        return {"mode": self.mode, "experts": self.cascade.router.num_clusters}


def add_cascade(bank: MaskBank, path: Path, name: str) -> dict[str, ServedCascade]:
    """Load a cascade's file into the bank; return it in each of its modes, by their names in the service.

    Raises:
        MaskFileError, ValueError: as `load_cascade`.
    """
    cascade = load_cascade(path, bank, name=name)
    masks = tuple(mask for mask in bank.names if mask.startswith(f"{name}/"))
    return {served_name(name, mode): ServedCascade(cascade, mode, masks) for mode in cascade.combinations}


def served_name(name: str, mode: str) -> str:
    """Return the name that a cascade is asked for in one of its modes."""
    return name if mode == DEFAULT else f"{name}/{mode}"


def heads_of(name: str, models: Mapping[str, Model]) -> dict[str, Model]:
    """Return what a cascade's file knows of classes, by the names of its modes and masks in the service."""
    parts = (names.DISPATCHER, names.expert(""))
    return {
        f"{name}/{key}" if key.startswith(parts) else served_name(name, key): model
        for key, model in models.items()
        if model.head is not None
    }
