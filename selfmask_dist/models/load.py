"""`load(path)`: a whole model out of a run's folder, a mask file, a cascade, or a name on a hub.

    model, transform, classes = load("runs/pets")
    load("pets.mask").predict(["photo.jpg"], top=3)

A folder is a run's, or one that `hub` pulled.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from selfmask_dist.cascade.model import load_cascade
from selfmask_dist.common import names
from selfmask_dist.common.preprocessing import Preprocessing
from selfmask_dist.maskfile import MaskFile, MaskFileError, Model, apply_mask, read_mask_file, warn_of_verdict
from selfmask_dist.maskfile.file import read_about
from selfmask_dist.maskfile.fit import weights_of
from selfmask_dist.maskfile.mask import WithoutWeightsError
from selfmask_dist.models.building import Settings, build, settings_for
from selfmask_dist.models.hub import pull
from selfmask_dist.models.pictures import PictureTransform
from selfmask_dist.models.repository import HUB_MASK, HubError, check_name, is_hub_name
from selfmask_dist.models.whole import CascadeEncoder, Loaded, WholeModel
from selfmask_dist.training.saving import read_outcome
from selfmask_dist.training.whole.keep import read_model


def load(
    source: str | Path,
    *,
    mask: str | None = None,
    mode: str = "conditional",
    config: str | Path | None = None,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    hub: str | None = None,
) -> Loaded:
    """Return a whole model: the backbone through its library, the mask on it, its head and class names.

    Args:
        source: a run's folder, a mask file, a cascade's file, or `owner/name` of a hub.
        mask: which mask, where the file holds several; of a cascade, that one alone.
        mode: of a cascade; see `Cascade.embed`.
        config: config.yaml of a run on the backbone, where the file does not say how it is built.
        weights: the backbone's weights, where they are in a file that is somewhere else here.
        hub: where names are looked up; see `hub.open_hub`.

    Raises:
        ValueError: there is no such model, nothing says which backbone, or it is another one.
        MaskFileError: the file is damaged, or does not fit the backbone.
        FileNotFoundError: no such file or folder.
    """
    path = Path(source)
    if not path.exists():
        if not is_hub_name(str(source)):
            raise FileNotFoundError(2, "no such run, mask file or name on a hub", str(source))
        try:
            path = pull(str(source), hub=hub)
        except HubError as error:
            raise HubError(f"{source} is no file or folder here, and as a name on a hub: {error}") from error
    about: dict[str, Any] = {
        "config": None if config is None else Path(config),
        "weights": None if weights is None else Path(weights),
    }
    if path.is_dir():
        file_path = _file_in(path)
        if file_path is None:
            return _load_weights(path, str(source), torch.device(device), about)
        path = file_path
    return _load_file(path, str(source), torch.device(device), about, mask=mask, mode=mode)


def from_pretrained(repo: str, *, hub: str | None = None, **options: Any) -> Loaded:
    """Return a whole model from a hub, its files checked; see `load`, whose options it takes.

    Args:
        repo: `owner/name`, whatever folder of that name lies here.
        hub: see `hub.open_hub`.

    Raises:
        HubError: there is no such repository, or it is not what its manifest says.
    """
    check_name(repo)
    return load(pull(repo, hub=hub), **options)


def _file_in(folder: Path) -> Path | None:
    """Return the mask file of a folder; None of a run that left weights."""
    for name in (names.CASCADE_MASK, names.MASK, HUB_MASK):
        if (folder / name).exists():
            return folder / name
    outcome = read_outcome(folder)
    if outcome.weights is None:
        raise ValueError(
            f"{folder} holds no mask, cascade or weights: it is no folder of a run that has finished"
        )
    return None


def _load_file(
    path: Path, name: str, device: torch.device, about: dict[str, Any], *, mask: str | None, mode: str
) -> Loaded:
    try:
        file = read_mask_file(path)
    except WithoutWeightsError:  # its bits are coded by the backbone, which is built first
        return _load_coded_by_weights(path, name, device, about, mask=mask)
    has_router = names.DISPATCHER in file.masks and any(key.startswith("router.") for key in file.tensors)
    is_cascade = has_router and mask is None
    key = mode if is_cascade else _mask_name(path, file, mask)
    model = file.models.get(key)
    settings = settings_for(path, file, model, **about)
    backbone = build(
        settings,
        fingerprint=file.backbone_fingerprint,
        pooling="" if model is None else model.pooling,
        masked=() if is_cascade else file.masks[key].bits,
    )
    encoder: nn.Module = backbone.encoder.to(device)
    if is_cascade:
        encoder = CascadeEncoder(load_cascade(path, encoder), mode)
    else:
        warn_of_verdict(file, path)
        apply_mask(encoder, file.masks[key], what=f"mask {key!r} of {path}")
    return _loaded(encoder, model, file, backbone.spec.preprocessing, device, name)


def _load_coded_by_weights(
    path: Path, name: str, device: torch.device, about: dict[str, Any], *, mask: str | None
) -> Loaded:
    head = read_about(path)
    known = next(iter(head.models.values()), None)
    settings = settings_for(path, head, known, **about)
    backbone = build(settings, fingerprint=head.backbone_fingerprint)
    file = read_mask_file(path, weights=weights_of(backbone.encoder))
    key = _mask_name(path, file, mask)
    warn_of_verdict(file, path)
    apply_mask(backbone.encoder, file.masks[key], what=f"mask {key!r} of {path}")
    encoder = backbone.encoder.to(device)
    return _loaded(encoder, file.models.get(key), file, backbone.spec.preprocessing, device, name)


def _mask_name(path: Path, file: MaskFile, mask: str | None) -> str:
    if mask is None and len(file.masks) > 1:
        raise MaskFileError(f"{path} holds several masks; name one of {sorted(file.masks)} (mask=, --mask)")
    if mask is not None and mask not in file.masks:
        raise MaskFileError(f"{path} holds no mask {mask!r}; it has {sorted(file.masks)}")
    return mask or next(iter(file.masks))


def _load_weights(folder: Path, name: str, device: torch.device, about: dict[str, Any]) -> Loaded:
    """Return the model of a run that left weights: fine-tuning, or a family that no mask file holds."""
    model = read_model(folder)
    settings: Settings = settings_for(folder, None, model, **about)
    backbone = build(settings, fingerprint="", pooling="" if model is None else model.pooling)
    read_outcome(folder).put_on(backbone.encoder)
    encoder = backbone.encoder.requires_grad_(False).eval().to(device)
    return _loaded(encoder, model, None, backbone.spec.preprocessing, device, name)


def _loaded(
    encoder: nn.Module,
    model: Model | None,
    file: MaskFile | None,
    preprocessing: Preprocessing,
    device: torch.device,
    name: str,
) -> Loaded:
    if file is not None and file.preprocessing:
        preprocessing = Preprocessing.from_dict(file.preprocessing)
    head = None if model is None or model.head is None else model.head.to(device)
    return Loaded(
        model=WholeModel(encoder, head),
        transform=PictureTransform(preprocessing),
        classes=() if model is None else model.classes,
        device=device,
        name=name,
        metrics={} if file is None else dict(file.metrics),
        licence="" if model is None else model.licence,
        provenance={} if model is None else dict(model.provenance),
    )
