"""What a run keeps so that its outcome answers with a class: head, class names, how the backbone is built.

keep_model(...)              into final.mask; where a run leaves weights in place of a mask, into model.json,
                             whose head is head.safetensors beside it (or text.safetensors)
model = read_model(folder)   out of either

Wiring alone: `maskfile.model` has the format, `objectives.supervised` the heads.
"""

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from selfmask_dist.backbones import Backbone
from selfmask_dist.backbones.pooling import pool_of
from selfmask_dist.common import names
from selfmask_dist.common.files import replacing, write_json
from selfmask_dist.common.version import VERSION
from selfmask_dist.config import Config
from selfmask_dist.maskfile import Head, Model, add_models, read_mask_file
from selfmask_dist.objectives import Objective
from selfmask_dist.objectives.supervised import Supervised

MODEL_NAME = "default"  # of a run's one mask in its file
_NOT_BUILT = ("batchnorm",)  # keys of the section `backbone` that only training reads


def keep_model(config: Config, backbone: Backbone, objective: Objective, directory: Path) -> None:
    """Add the whole model to what a supervised run has left in its folder. On the main rank, after `save`.

    Nothing is done where the objective does not classify, or where `run.whole_model` is off. A mask without
    classes gets a model without a head where its backbone takes more to build than its name.
    """
    if not config.run.whole_model:
        return
    if not isinstance(objective, Supervised):
        if config.backbone.pool != "model" and (directory / names.MASK).exists():
            add_models(directory / names.MASK, {MODEL_NAME: _without_head(config, backbone)})
        return
    model = describe_model(config, backbone, objective, directory)
    if (directory / names.MASK).exists():
        add_models(directory / names.MASK, {MODEL_NAME: model})
        return
    assert model.head is not None
    if objective.head is None:
        with replacing(directory / names.TEXT_HEAD) as partial:
            save_file(model.head.tensors(), partial)
    about = {"kind": model.head.kind, "norm": model.head.norm, "scale": model.head.scale}
    about |= {} if model.head.target == "class" else {"target": model.head.target}
    rest = {field.name: getattr(model, field.name) for field in fields(Model) if field.name != "head"}
    write_json(directory / names.MODEL, {**rest, "head": about})


def describe_model(config: Config, backbone: Backbone, objective: Supervised, directory: Path) -> Model:
    """Return the whole model as files hold it, its head as the run has saved it in its folder."""
    plain = _without_head(config, backbone)
    provenance = {**plain.provenance, "objective": f"{config.objective.name}, head {config.objective.head}"}
    return replace(
        plain,
        # not out of the objective where there is a file: an engine may have cut or emptied its tensors
        head=head_of(objective, load_file(saved) if (saved := directory / names.HEAD).exists() else None),
        classes=objective.classes,
        provenance=provenance,
    )


def _without_head(config: Config, backbone: Backbone) -> Model:
    """Return how the backbone of a run is built, and where its mask comes from."""
    provenance = {
        "written_by": f"selfmask_dist {VERSION}",
        "method": config.method,
        "objective": config.objective.name,
        "seed": str(config.seed),
    }
    if config.method == "mask":
        provenance["mask"] = str(config.mask.family)
    published = getattr(backbone.encoder, "pretrained_cfg", None) or {}
    if config.backbone.pretrained and config.backbone.weights is None and published.get("license"):
        provenance["backbone_licence"] = str(published["license"])
    return Model(
        head=None,
        backbone=backbone_settings(config),
        pooling=pooling_of(backbone.encoder),
        licence=config.run.licence or "",
        provenance=provenance,
    )


def head_of(objective: Supervised, saved: Mapping[str, Tensor] | None = None) -> Head:
    """Return the head of a supervised objective; a masked one as theta.

    Args:
        saved: what its run kept in head.safetensors; None: what the objective holds.
    """
    if objective.head is None:
        text = objective.text_embeddings.detach().cpu()
        return Head("cosine", text, scale=objective.logit_scale)
    state = objective.kept_state() if saved is None else saved
    section = objective.config
    return _linear(state, section.head_norm, objective.length, section.target)


def _linear(state: Mapping[str, Tensor], norm: str, length: float, target: str) -> Head:
    """Return a head out of what a run keeps of its objective (head.safetensors)."""
    parts = {
        "weight": "head.weight",
        "bias": "head.bias",
        "mean": "norm.running_mean",
        "var": "norm.running_var",
        "out_mean": "target_mean",
        "out_std": "target_deviation",
    }
    found = {part: state[key].detach().cpu().clone() for part, key in parts.items() if key in state}
    scale = length if norm == "l2" else 1.0
    return Head("linear", norm=norm, scale=scale, target=target, **found)


def backbone_settings(config: Config) -> dict[str, Any]:
    """Return what a reader needs to build the backbone again; see `maskfile.Model`."""
    section = config.backbone
    found: dict[str, Any] = section.model_dump(mode="json", exclude_defaults=True, exclude=set(_NOT_BUILT))
    found["name"] = section.name
    if section.weights is not None:
        found["weights"] = Path(section.weights).name  # where it lies is the owner's business
    elif not section.pretrained:
        found["seed"] = config.seed
    return found


def pooling_of(encoder: nn.Module) -> str:
    """Return how an encoder pools its tokens or maps: as `backbone.pool` says, or else in its library's word;
    empty where nothing says it.
    """
    if (pool := pool_of(encoder)) != "model":
        return pool
    for name in ("global_pool", "pool_type"):
        found = getattr(encoder, name, None)
        found = getattr(found, "pool_type", None) if isinstance(found, nn.Module) else found
        if isinstance(found, str):
            return found
    return ""


def read_model(folder: Path) -> Model | None:
    """Return the whole model of a run's folder; None where the run kept none.

    Raises:
        ValueError: model.json and the head beside it do not fit.
    """
    if (folder / names.MASK).exists():
        return read_mask_file(folder / names.MASK).models.get(MODEL_NAME)
    path = folder / names.MODEL
    if not path.exists():
        return None
    stated: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    about = stated.pop("head")
    try:
        if about["kind"] == "cosine":
            arrays = load_file(folder / names.TEXT_HEAD)
            head = Head("cosine", norm="none", scale=about["scale"], **arrays)
        else:
            state = load_file(folder / names.HEAD)
            head = _linear(state, about["norm"], about["scale"], about.get("target", "class"))
        return Model(**{**stated, "head": head, "classes": tuple(stated["classes"])})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} and the head beside it do not fit: {error}") from error
