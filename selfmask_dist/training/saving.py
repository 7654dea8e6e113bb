"""What a run leaves beside its numbers: the mask file (dense weights where bits are not all) and the head."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from selfmask_dist import objectives
from selfmask_dist.backbones import Backbone
from selfmask_dist.config import Config
from selfmask_dist.maskfile.api import Masks, save_masks
from selfmask_dist.masking import Family
from selfmask_dist.parallel import Engine
from selfmask_dist.training.build import Trained, lora_options
from selfmask_dist.training.finetune import CHANGED, WHOLE, save_changed


def save(
    config: Config,
    trained: Trained,
    backbone: Backbone,
    objective: objectives.Objective,
    directory: Path,
    *,
    engine: Engine,
    metrics: dict[str, float],
) -> dict[str, Any]:
    """Write the mask file (or the trained weights, as theta) and the head; returns their sizes in bytes.

    Collective: every rank must call; the first one writes.
    """
    sizes: dict[str, Any] = {}
    is_main = engine.world.is_main
    if trained.masks is not None and is_in_mask_file(trained.masks.family):
        num_weights = sum(entry.theta.numel() for entry in trained.masks.entries)
        mask_bytes = save_masks(
            trained.masks,
            directory / "final.mask",
            is_writer=is_main,
            backbone=backbone.spec.name,
            backbone_fingerprint=backbone.spec.fingerprint,
            preprocessing=backbone.spec.preprocessing.to_dict(),
            metrics=metrics,
        )
        sizes["mask"] = {
            "masked_weights": num_weights,
            "active": 1 - sum(_pruned(trained.masks)) / num_weights,
            "bytes": mask_bytes,
            "bits_per_weight": mask_bytes * 8 / num_weights,
            "weight_bytes": num_weights * 4,
        }
    else:
        sizes["weights"] = _save_weights(config, trained, engine, directory)
        sizes["stored_bytes"] = sizes["weights"]["bytes"]
    if trained.head_masks is not None:
        save_masks(trained.head_masks, directory / "head.mask", is_writer=is_main)
    head = _plain(objective.kept_state())  # projectors are thrown away
    if head and is_main:
        save_file(head, directory / "head.safetensors")
    return sizes


def _save_weights(config: Config, trained: Trained, engine: Engine, directory: Path) -> dict[str, Any]:
    """Write the encoder, or what fine-tuning changed of it where that is less; returns sizes. Collective."""
    section, buffers = config.finetune, dict(engine.encoder.named_buffers())
    moved = [name for name, before in trained.statistics.items() if not torch.equal(buffers[name], before)]
    is_part = trained.masks is None and (section.train != "all" or bool(section.freeze))
    path = directory / (CHANGED if is_part else WHOLE)
    weights = engine.whole_weights({*trained.weights, *moved} if is_part else None)
    if engine.world.is_main and is_part:
        save_changed(weights, path, lora=lora_options(config) if section.train == "lora" else None)
    elif engine.world.is_main:
        save_file(_plain(weights), path)
    num_trained = sum(tensor.numel() for name, tensor in weights.items() if name in trained.weights)
    if trained.masks is not None:
        num_trained = sum(entry.theta.numel() for entry in trained.masks.entries)
    return {
        "trained": num_trained,
        "file": path.name,
        "bytes": path.stat().st_size if engine.world.is_main else 0,
    }


def _pruned(masks: Masks) -> list[float]:
    sparsity = masks.sparsity()
    return [sparsity[entry.name] * entry.theta.numel() for entry in masks.entries]


def _plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def is_in_mask_file(family: Family) -> bool:
    """Whether a mask file says all of what was trained: theta = [a] * W * M on frozen weights, or another
    form that files hold.
    """
    return family.form != "threshold" or (family.is_mask and not family.trains_weight)
