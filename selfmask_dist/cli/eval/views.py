"""Views of a subject: the ways to embed an image that its masks, weights and combinations are."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from selfmask_dist import maskfile
from selfmask_dist.cascade.model import modes_of
from selfmask_dist.common import names
from selfmask_dist.config import Config
from selfmask_dist.maskfile.file import read_about
from selfmask_dist.maskfile.rows import StoredMask, stored_masks
from selfmask_dist.training.saving import read_outcome

SPLITS = ("train", "test")
AnyMask = maskfile.Mask | StoredMask


@dataclass(frozen=True)
class TunedWeights:
    """A file of the weights that fine-tuning changed, or of a whole encoder.

    method: of its run. backbone_fingerprint: of the weights that it started from.
    """

    path: Path
    method: str
    backbone_fingerprint: str


@dataclass(frozen=True)
class View:
    """One way to embed an image, by its name in tables.

    folder: of its stores. mask, weights: both None for the frozen backbone; a mask is in memory, or stays in
    its file. mode: of a cascade's combination.
    made_with: what its stores' provenance says of mask or weights. whiten: after a whitened PCA of the
    training embeddings. members: the mean of these views' embeddings.
    """

    name: str
    folder: str = ""
    mask: AnyMask | None = None
    weights: TunedWeights | None = None
    mode: str | None = None
    made_with: str = ""
    whiten: bool = False
    members: tuple[View, ...] = ()


def mask_path(path: Path) -> Path | None:
    """Return where the mask of a run or a file is; None for a run without one.

    Raises:
        ValueError: the folder is no run's, or a cascade that is not finished.
    """
    if not path.is_dir():
        return path
    if not (path / names.CONFIG).exists():
        raise ValueError(f"{path} is not a run: it has no {names.CONFIG}")
    if (path / names.CASCADE_MASK).exists():
        return path / names.CASCADE_MASK
    mask = read_outcome(path).mask
    if mask is None and (path / names.DISPATCHER).exists():
        raise ValueError(f"{path} is a cascade that is not finished: it has no {names.CASCADE_MASK} yet")
    return mask


def open_files(
    paths: Sequence[Path], *, decodes: bool
) -> tuple[dict[str, maskfile.MaskFile], dict[str, dict[str, AnyMask]]]:
    """Return the mask files of runs or files, without their masks, and the masks of each, by their paths.

    Args:
        decodes: read whole masks, and verify every byte of the files; else they stay in their files.

    Raises:
        ValueError: as `mask_path`; or a file cannot be read (MaskFileError).
    """
    files: dict[str, maskfile.MaskFile] = {}
    masks_of: dict[str, dict[str, AnyMask]] = {}
    for place in (str(found) for path in paths if (found := mask_path(path))):
        if decodes:
            file = maskfile.read_mask_file(place)
            files[place], masks_of[place] = replace(file, masks={}), {**file.masks}
        else:
            files[place], masks_of[place] = read_about(place, with_tensors=True), {**stored_masks(place)}
    return files, masks_of


def find_weights(run: Path) -> TunedWeights | None:
    """Return the weights of a finished run that left no mask file; None where it left none.

    Raises:
        ValueError: the run has not finished.
    """
    outcome = read_outcome(run)
    if outcome.weights is None:
        return None
    result = outcome.result()
    return TunedWeights(outcome.weights, result["method"], result["fingerprint"])


def cascade_views(path: Path, file: maskfile.MaskFile, masks: Mapping[str, AnyMask]) -> list[View]:
    """Return the ways to embed of a cascade's bundle, after the frozen one.

    Beside a run the stores are the run's own, known by the files that they were made with.
    """
    dispatcher = names.DISPATCHER
    of_run = {
        dispatcher: path.parent / dispatcher / names.MASK,
        **{mode: path.parent / names.COMBINATION / f"{mode}.safetensors" for mode in modes_of(file)},
    }
    made_with = {
        name: _sha256(place) if place.exists() else f"{_sha256(path)} {name}"
        for name, place in of_run.items()
    }
    masked = View("self-masked", dispatcher, mask=masks[dispatcher], made_with=made_with[dispatcher])
    frozen = View("frozen, whitened", "frozen", whiten=True)
    return [
        masked,
        *(View(mode, mode, mode=mode, made_with=made_with[mode]) for mode in modes_of(file)),
        frozen,
        replace(masked, name="self-masked, whitened", whiten=True),
    ]


def part_views(path: Path, masks: Mapping[str, AnyMask]) -> list[View]:
    """Return the views that a cascade's combinations are made of, the dispatcher's first; see
    `cascade_views`.
    """
    num_experts = sum(name != names.DISPATCHER for name in masks)
    views = []
    for name in (names.DISPATCHER, *map(names.expert, range(num_experts))):
        of_run = path.parent / name / names.MASK
        made_with = _sha256(of_run) if of_run.exists() else f"{_sha256(path)} {name}"
        views.append(View(name, name, mask=masks[name], made_with=made_with))
    return views


def mask_views(
    paths: Sequence[Path],
    masks_of: Mapping[str, Mapping[str, AnyMask]],
    weights: dict[Path, TunedWeights],
    config: Config,
) -> list[View]:
    """Return the views of masks and weights in the order given, and of their mean where they are several.

    Args:
        masks_of: by a file's path, its masks by name.
    """
    views: list[View] = []
    for path in paths:
        if path in weights:
            trained = weights[path]
            kind = "fine-tuned" if trained.method == "finetune" else f"trained ({trained.method})"
            title, folder = (kind, "trained") if len(paths) == 1 else _title(path.name, views)
            views.append(View(title, folder, weights=trained, made_with=_sha256(trained.path)))
            continue
        place = mask_path(path)
        masks = {} if place is None else masks_of[str(place)]
        for name, mask in masks.items():
            assert place is not None
            if len(paths) == len(masks) == 1:
                kind = "masked" if config.objective.name == "supervised" else "self-masked"
                title, folder = kind, "masked"
            else:
                stem = place.parent.name if place.name == names.MASK else place.stem
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
