"""The parts of a run, each made from its section of the configuration: data, views, backbone, objective.

Wiring without an order of events (that is `adapt`); each function is also of use to a caller with a loop of
its own. What trains is made by `prepare`.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from selfmask_dist import data, objectives
from selfmask_dist.backbones import Backbone, load_backbone
from selfmask_dist.common.preprocessing import Preprocessing
from selfmask_dist.config import Config
from selfmask_dist.config.objectives import VIEWS, WITH_CAPTIONS


def open_data(config: Config, *, require_labels: bool = True) -> tuple[data.Source, data.Source]:
    """Return the train and test sources, with one list of classes."""
    paths = {"data.train": config.data.train, "data.test": config.data.test}
    missing = [key for key, path in paths.items() if path is None]
    if missing:
        raise ValueError(f"{' and '.join(missing)} is not set; give a folder of shards (see docs/data.md)")
    assert config.data.train is not None
    assert config.data.test is not None
    whole = data.open_source(config.data.train, require_labels=require_labels)
    test = data.open_source(config.data.test, classes=whole.classes, require_labels=require_labels)
    chosen = _subset("data.subset", config.data.subset, whole)
    return chosen, _subset("data.test_subset", config.data.test_subset, test)


def _subset(key: str, path: str | None, source: data.Source) -> data.Source:
    return source if path is None else data.Subset(source, _read_subset(key, path, len(source)))


def _read_subset(key: str, path: str, num_samples: int) -> npt.NDArray[np.int64]:
    try:
        numbers = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{key} {path} cannot be read as a .npy file: {error}") from error
    if numbers.ndim != 1 or not np.issubdtype(numbers.dtype, np.integer) or not len(numbers):
        raise ValueError(
            f"{key} {path} holds {numbers.dtype} {numbers.shape}; it needs a list of sample numbers"
        )
    if numbers.min() < 0 or numbers.max() >= num_samples:
        whole = "data.test" if key == "data.test_subset" else "data.train"
        raise ValueError(
            f"{key} {path} names samples {numbers.min()} to {numbers.max()}; "
            f"{whole} has 0 to {num_samples - 1}"
        )
    return numbers.astype(np.int64)


def build_backbone(config: Config, *, in_file: bool = False) -> Backbone:
    """Return the frozen encoder, on the CPU; one that takes the crops' sizes where the objective is on crops.

    Args:
        in_file: leave the weights in their file, for an engine that takes its share of them.
    """
    backbone = load_backbone(config.backbone, seed=config.seed, in_file=in_file)
    if config.objective.name in VIEWS and config.method in ("mask", "finetune", "cascade"):
        from selfmask_dist.backbones.any_size import accept_sizes  # imports timm

        sizes = {crops.size for crops in crop_sizes(config, backbone.spec.preprocessing)}
        accept_sizes(backbone.encoder, sizes, name=backbone.spec.name)
    if config.engine.channels_last:
        # of images alone: convolutions pass the layout on, and weights keep the one that masks are stored in
        backbone.encoder.register_forward_pre_hook(_channels_last)
    return backbone


def _channels_last(_: nn.Module, images: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(image.contiguous(memory_format=torch.channels_last) for image in images)


def crop_sizes(config: Config, preprocessing: Preprocessing) -> tuple[data.Crops, ...]:
    """Return the large crops and, where there are any, the small ones."""
    section = config.crops
    large = data.Crops(
        section.global_count, section.global_size or preprocessing.image_size, section.global_scale
    )
    if not section.local_count:
        return (large,)
    return large, data.Crops(section.local_count, section.local_size, section.local_scale)


def train_transform(config: Config, preprocessing: Preprocessing) -> data.Transform:
    """Return what makes the views of training: crops for objectives without labels; else one crop, or the
    evaluation's where `data.augment` is off.
    """
    section = config.data
    if config.objective.name in VIEWS and config.objective.name not in WITH_CAPTIONS:
        return _multicrop(config, preprocessing)
    one = data.train_transform(preprocessing, crop_scale=section.crop_scale, flip=section.flip)
    if not section.augment:
        one = data.eval_transform(preprocessing)
    return data.Joined(one, _multicrop(config, preprocessing)) if config.objective.name == "slip" else one


def _multicrop(config: Config, preprocessing: Preprocessing) -> data.Transform:
    section, color = config.crops, config.crops.color
    distortion = data.Distortion(
        flip=0.5 if config.data.flip else 0.0,
        brightness=0.8 * color,
        contrast=0.8 * color,
        saturation=0.8 * color,
        hue=0.2 * color,
        gray=section.gray,
        blur=section.blur,
    )
    return data.multicrop_transform(
        preprocessing,
        crops=crop_sizes(config, preprocessing),
        distortion=distortion,
        interpolation="bicubic" if preprocessing.interpolation == "bicubic" else "bilinear",
        on_device=section.on_device,
    )


def build_objective(
    config: Config,
    backbone: Backbone,
    classes: tuple[str, ...],
    context: objectives.Context,
    *,
    steps_per_epoch: int,
    teacher: objectives.LogitsFn | None = None,
) -> objectives.Objective:
    """Return the objective with a new head for `classes`, on the CPU.

    Args:
        teacher: images (n, 3, H, W) -> logits (n, classes), for a run that trains with
            `objective.distill_from`; None where the objective is only asked to predict.
    """
    num_steps = round(config.train.epochs * steps_per_epoch)
    context = replace(context, steps_per_epoch=steps_per_epoch, num_steps=num_steps)
    return objectives.build_objective(
        config, backbone=backbone, classes=classes, context=context, distill_teacher=teacher
    )


def lora_options(config: Config) -> dict[str, Any]:
    """Return the arguments of `add_lora`."""
    section = config.finetune
    return {
        "rank": section.lora_rank,
        "alpha": section.lora_alpha,
        "targets": list(section.lora_targets),
        "seed": config.seed,
    }
