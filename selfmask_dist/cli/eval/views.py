"""Views of a subject: the ways to embed an image that its masks, weights and combinations are."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from selfmask_dist import maskfile
from selfmask_dist.cascade.model import modes_of
from selfmask_dist.cli.eval.weights import Weights
from selfmask_dist.common.names import DISPATCHER
from selfmask_dist.config import Config


@dataclass(frozen=True)
class View:
    """One way to embed an image, by its name in tables.

    folder: of its stores. mask, weights: both None for the frozen backbone. mode: of a cascade's combination.
    made_with: what its stores' provenance says of mask or weights. whiten: after a whitened PCA of the
    training embeddings. members: the mean of these views' embeddings.
    """

    name: str
    folder: str = ""
    mask: maskfile.Mask | None = None
    weights: Weights | None = None
    mode: str | None = None
    made_with: str = ""
    whiten: bool = False
    members: tuple[View, ...] = ()


def mask_path(path: Path) -> Path | None:
    """Where the mask of a run or a file is; None for a run without one."""
    if not path.is_dir():
        return path
    if not (path / "config.yaml").exists():
        raise ValueError(f"{path} is not a run: it has no config.yaml")
    for name in ("cascade.mask", "final.mask"):
        if (path / name).exists():
            return path / name
    if (path / DISPATCHER).exists():
        raise ValueError(f"{path} is a cascade that is not finished: it has no cascade.mask yet")
    return None


def cascade_views(path: Path, file: maskfile.MaskFile) -> list[View]:
    """In a run's folder the stores are the run's, known by the files that they were made with."""
    of_run = {
        DISPATCHER: path.parent / DISPATCHER / "final.mask",
        **{mode: path.parent / "combination" / f"{mode}.safetensors" for mode in modes_of(file)},
    }
    made_with = {
        name: _sha256(place) if place.exists() else f"{_sha256(path)} {name}"
        for name, place in of_run.items()
    }
    masked = View("self-masked", DISPATCHER, mask=file.masks[DISPATCHER], made_with=made_with[DISPATCHER])
    frozen = View("frozen, whitened", "frozen", whiten=True)
    return [
        masked,
        *(View(mode, mode, mode=mode, made_with=made_with[mode]) for mode in modes_of(file)),
        frozen,
        replace(masked, name="self-masked, whitened", whiten=True),
    ]


def mask_views(
    paths: Sequence[Path], files: dict[str, maskfile.MaskFile], weights: dict[Path, Weights], config: Config
) -> list[View]:
    """Of masks and weights in the order given, and their mean where they are several."""
    views: list[View] = []
    for path in paths:
        if path in weights:
            trained = weights[path]
            kind = "fine-tuned" if trained.method == "finetune" else f"trained ({trained.method})"
            title, folder = (kind, "trained") if len(paths) == 1 else _title(path.name, views)
            views.append(View(title, folder, weights=trained, made_with=_sha256(trained.path)))
            continue
        place = mask_path(path)
        masks = {} if place is None else files[str(place)].masks
        for name, mask in masks.items():
            assert place is not None
            if len(paths) == len(masks) == 1:
                kind = "masked" if config.objective.name == "supervised" else "self-masked"
                title, folder = kind, "masked"
            else:
                stem = place.parent.name if place.name == "final.mask" else place.stem
                title, folder = _title(f"{stem}:{name}" if len(masks) > 1 else stem, views)
            made_with = _sha256(place) + (f" {name}" if len(masks) > 1 else "")
            views.append(View(title, folder, mask=mask, made_with=made_with))
    if len(views) > 1:
        views.append(View("mean of embeddings", members=tuple(views)))
    return views


def _title(name: str, views: list[View]) -> tuple[str, str]:
    """A name that no view has yet, and its folder's."""
    while name in {view.name for view in views}:
        name += "'"
    return name, name.replace("/", "_").replace(":", "_")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
