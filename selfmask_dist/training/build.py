"""The parts of a run, each made from its section of the configuration: data, views, backbone, objective.

Wiring without an order of events (that is `adapt`); each function is also of use to a caller with a loop of
its own. What trains is made by `prepare`.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from selfmask_dist import data, objectives
from selfmask_dist.backbones import Backbone, load_backbone, sample_of
from selfmask_dist.backbones.mapping import tensors_in_files
from selfmask_dist.common.preprocessing import Preprocessing
from selfmask_dist.common.text import some
from selfmask_dist.config import Config
from selfmask_dist.config.objectives import ON_BANK, VIEWS, WITH_CAPTIONS
from selfmask_dist.evals.measure import are_labelled, neighbours_to_measure
from selfmask_dist.masking.selection import select
from selfmask_dist.parallel import World, take_from_main
from selfmask_dist.training.habits.pictures import stronger_of

if TYPE_CHECKING:
    from selfmask_dist.parallel.fsdp import ShardedEncoder


def open_data(config: Config, *, require_labels: bool = True) -> tuple[data.Source, data.Source]:
    """Return the train and test sources, with one list of classes; the test source is the part of the
    training images that `data.held_out` asks for, where it does.
    """
    if config.data.train is None or not _has_test(config):
        given = {"data.train": config.data.train is not None, "data.test": _has_test(config)}
        missing = " and ".join(key for key, is_given in given.items() if not is_given)
        raise ValueError(f"{missing} is not set; give a folder of shards (see docs/data.md)")
    require_labels = require_labels and config.objective.target == "class"
    train, held_out = _open_train(config, require_labels=require_labels)
    if held_out is None:
        assert config.data.test is not None
        held_out = _open(config, config.data.test, classes=train.classes, require_labels=require_labels)
    return train, _subset("data.test_subset", config.data.test_subset, held_out)


def open_train(config: Config, *, require_labels: bool = True) -> data.Source:
    """Return the train source, without what is held out."""
    if config.data.train is None:
        raise ValueError("data.train is not set; give a folder of shards (see docs/data.md)")
    return _open_train(config, require_labels=require_labels)[0]


def _open_train(config: Config, *, require_labels: bool) -> tuple[data.Source, data.Source | None]:
    """Return the train source, and what is held out of it, if anything is."""
    assert config.data.train is not None
    whole: data.Source = _open(config, config.data.train, require_labels=require_labels)
    held_out: data.Source | None = None
    if config.data.held_out is not None:
        whole, held_out = data.hold_out(whole, config.data.held_out)
    return _subset("data.subset", config.data.subset, whole), held_out


def _has_test(config: Config) -> bool:
    return config.data.test is not None or config.data.held_out is not None


def open_what_there_is(config: Config) -> tuple[data.Source, data.Source | None]:
    """Return the train source and the test source of a run whose objective takes no labels, None where there
    is no test split. Where not one training image has a label, labels are not asked for.

    Raises:
        ValueError: as `open_data`; also where some images have a label and some have none, and k-NN or probe
            are to be measured.
    """
    section = config.eval
    measures = section.final or section.frozen_baseline or section.knn_every > 0
    if not measures or not _has_test(config):
        if not _has_test(config):
            return open_train(config, require_labels=False), None
        return open_data(config, require_labels=False)
    try:
        return open_data(config)
    except ValueError as error:
        try:
            found = open_data(config, require_labels=False)
        except ValueError:
            raise error from None
        if data.count_labels(found[0])[1:].any():
            raise
        return found


def _open(config: Config, path: str, **options: Any) -> data.TarSource:
    """Open one of the run's sources. One process of the run holds the index against its folder for all."""
    return data.open_source(
        path,
        trust_index=not _is_first(),
        cache=config.data.cache,
        cache_bytes=int(config.data.cache_gb * 1e9),
        **options,
    )


def _is_first() -> bool:
    """Return whether this is rank 0 of the whole run, as the launcher counts."""
    return os.environ.get("RANK", "0") == "0"


def _subset(key: str, path: str | None, source: data.Source) -> data.Source:
    """Return the part of a source that a .npy file lists; the file is mapped."""
    if path is None:
        return source
    try:
        part = data.Subset.in_file(source, Path(path).absolute())
    except (OSError, ValueError) as error:
        raise ValueError(f"{key} {path} cannot be read as a .npy file: {error}") from error
    numbers = part.indices
    if numbers.ndim != 1 or not np.issubdtype(numbers.dtype, np.integer) or not len(numbers):
        raise ValueError(
            f"{key} {path} holds {numbers.dtype} {numbers.shape}; it needs a list of sample numbers"
        )
    if numbers.min() < 0 or numbers.max() >= len(source):
        whole = "data.test" if key == "data.test_subset" else "data.train"
        raise ValueError(
            f"{key} {path} names samples {numbers.min()} to {numbers.max()}; "
            f"{whole} has 0 to {len(source) - 1}"
        )
    return part


def build_backbone(config: Config, *, in_file: bool = False, world: World | None = None) -> Backbone:
    """Return the frozen encoder, on the CPU; one that takes the crops' sizes where the objective is on crops.

    Args:
        in_file: leave the weights in their file, for an engine that takes its share of them.
        world: whose ranks all build it here. The main one then reads every weight for all of them, and the
            others make sure by a sample that theirs are the same. Collective: every rank must call.
    """
    reads_all = world is None or world.is_main
    dense = config.objective.target == "dense"  # one vector a patch
    backbone = load_backbone(
        config.backbone, seed=config.seed, in_file=in_file, reads_all=reads_all, dense=dense
    )
    if world is not None:
        found, sample = backbone.spec.fingerprint, sample_of(backbone.encoder.state_dict())
        found = take_from_main(world, found, sample=sample, what="the backbone's weights")
        backbone = replace(backbone, spec=replace(backbone.spec, fingerprint=found))
    check_patches(backbone, {"backbone.image_size": backbone.spec.preprocessing.image_size})
    if config.objective.name in VIEWS and config.method in ("mask", "finetune", "cascade"):
        from selfmask_dist.backbones.any_size import accept_sizes  # imports timm

        crops = crop_sizes(config, backbone.spec.preprocessing)
        keys = ("crops.global_size", "crops.local_size")
        check_patches(backbone, {key: one.size for key, one in zip(keys, crops, strict=False)})
        accept_sizes(backbone.encoder, {one.size for one in crops}, name=backbone.spec.name)
    if config.engine.channels_last:
        # of images alone: convolutions pass the layout on, and weights keep the one that masks are stored in
        backbone.encoder.register_forward_pre_hook(_channels_last)
    return backbone


def shard_backbone(
    backbone: Backbone, config: Config, world: World, *, keeps_frozen: bool = True
) -> "ShardedEncoder":
    """Cut an encoder that is only to be run over all ranks, in place. Collective: every rank must call.

    Args:
        backbone: best left in its file (`build_backbone`).
        keeps_frozen: whether masks are put on it, and taken off again.
    """
    from selfmask_dist.parallel.fsdp import ShardedEncoder  # imports FSDP2

    return ShardedEncoder(
        backbone.encoder,
        blocks=backbone.spec.blocks,
        world=world,
        config=config.engine,
        in_file=tensors_in_files(backbone.encoder),
        keeps_frozen=keeps_frozen,
    )


# ---- checked before anything is measured or trained


def check_run(config: Config, backbone: Backbone, train: data.Source, test: data.Source | None) -> list[str]:
    """Return sentences on what a person should know of the data before a run begins, mostly none.

    Raises:
        ValueError: what would fail later, or be passed over: patterns of masks that match nothing, more
            neighbours than there are images, crops that patches do not cover.
    """
    if config.method in ("mask", "cascade"):
        section = config.mask
        select(
            backbone.encoder,
            section.include,
            exclude=section.exclude,
            first_layers=section.first_layers,
            allow_norm=section.allow_norm,
        )
    if config.objective.target != "class":
        return ["k-NN is left out: it is a vote on one class, and objective.target is another"]
    if test is None or not are_labelled(train, test):
        return _notes_without_labels(config, test)
    # of all samples of both: by the one process that says them
    notes = data.notes_on_splits(train, test) if _is_first() else []
    return check_neighbours(config, len(train)) + notes


def _notes_without_labels(config: Config, test: data.Source | None) -> list[str]:
    section = config.eval
    if not (section.final or section.frozen_baseline or section.knn_every):
        return []
    why = "data.test is not set" if test is None else "images have no labels"
    rest = "nothing" if not section.measures_retrieval(config.objective.name) else "instance retrieval alone"
    return [f"k-NN and probe are left out, as {why}: {rest} is measured"]


def check_neighbours(config: Config, num_train: int) -> list[str]:
    """Return what to say about the k of `eval.knn_k` that are left out; see `neighbours_to_measure`.

    Raises:
        ValueError: a k is larger than its bank.
    """
    section = config.eval
    measured: tuple[int, ...] = ()
    is_measured = config.method not in ("mask", "finetune") or section.final or section.frozen_baseline
    if is_measured:
        measured = neighbours_to_measure(config, num_train)
        too_many = [k for k in measured if k > num_train]
        if too_many:
            raise ValueError(
                f"eval.knn_k has {some([str(k) for k in too_many])}, and the bank is the {num_train} images "
                f"of data.train: there are not so many neighbours. Leave it out, or take more images"
            )
    bank = min(section.monitor_samples, num_train)
    if section.knn_every and config.method in ("mask", "finetune", "cascade") and section.knn_k[0] > bank:
        raise ValueError(
            f"eval.knn_k begins with {section.knn_k[0]}, which is measured while training, and that bank has "
            f"{bank} images (eval.monitor_samples={section.monitor_samples}, data.train={num_train}). Put a "
            f"smaller one first, or set eval.knn_every=0"
        )
    left_out = [str(k) for k in section.knn_k if is_measured and k not in measured]
    return [
        f"k-NN with k={k}, a default of eval.knn_k, is left out: data.train has {num_train} images"
        for k in left_out
    ]


def check_patches(backbone: Backbone, sizes: dict[str, int]) -> None:
    """Do nothing where patches cover images of all these sizes.

    Libraries cut off what is left at the right and the lower edge, without a word.

    Args:
        sizes: pixels, by the key that sets them.

    Raises:
        ValueError: a size is no multiple of the patch's.
    """
    patch = _patch_size(backbone.encoder)
    for key, size in sizes.items():
        if patch > 1 and size % patch:
            near = [n for n in (size // patch * patch, (size // patch + 1) * patch) if n]
            raise ValueError(
                f"{key}={size} is not a multiple of {patch}, the patch size of {backbone.spec.name}: the "
                f"last {size % patch} pixels of each side would never be seen. Set {key} to "
                f"{' or '.join(map(str, near))}"
            )


def _patch_size(encoder: nn.Module) -> int:
    """Return the side of the patches that a transformer cuts images into; 1 where it cuts into none."""
    for module in encoder.modules():
        size = getattr(module, "patch_size", None)
        size = size[0] if isinstance(size, tuple | list) and size else size
        is_covering = getattr(module, "dynamic_img_pad", False)  # images are filled up to whole patches
        if (
            isinstance(size, int)
            and not is_covering
            and any(isinstance(m, nn.Conv2d) for m in module.children())
        ):
            return size
    return 1


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
    if config.objective.name in ON_BANK:
        return mild_crops(config, preprocessing, count=config.nbd.views)
    if config.objective.name in VIEWS and config.objective.name not in WITH_CAPTIONS:
        return _multicrop(config, preprocessing)
    if config.objective.target == "dense":
        return data.DenseTransform(
            preprocessing, section.crop_scale if section.augment else None, section.flip
        )
    one = data.train_transform(
        preprocessing, crop_scale=section.crop_scale, flip=section.flip, stronger=stronger_of(config)
    )
    if not section.augment:
        one = data.eval_transform(preprocessing)
    return data.Joined(one, _multicrop(config, preprocessing)) if config.objective.name == "slip" else one


def mild_crops(config: Config, preprocessing: Preprocessing, *, count: int) -> data.MultiCrop:
    """Return what makes `count` views of a picture as the section nbd describes them."""
    section = config.nbd
    distortion = data.Distortion(
        flip=0.5 if config.data.flip else 0.0,
        color=1.0,
        brightness=section.jitter,
        contrast=section.jitter,
        saturation=section.jitter,
        hue=0.0,
        gray=0.0,
        blur=0.0,
    )
    return data.multicrop_transform(
        preprocessing,
        crops=(data.Crops(count, preprocessing.image_size, section.crop_scale),),
        distortion=distortion,
        interpolation="bicubic" if preprocessing.interpolation == "bicubic" else "bilinear",
        on_device=config.crops.on_device,
    )


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
