"""The parts of a run, each made from its section of the configuration: data, backbone, objective, masks.

Wiring without an order of events (that is `run`); each function is also of use to a caller with a loop of its
own.
"""

import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from selfmask_dist import data, objectives
from selfmask_dist.api import Masks, attach
from selfmask_dist.backbones import Backbone, load_backbone, set_train_mode
from selfmask_dist.checkpoint import load_newest
from selfmask_dist.config import Config
from selfmask_dist.mask_groups import mask_groups, second_weights, weight_group
from selfmask_dist.masking import Family, build_family, measure
from selfmask_dist.parallel import Engine, EngineOptions
from selfmask_dist.parallel.engine import EngineState
from selfmask_dist.preprocessing import Preprocessing
from selfmask_dist.trainer import NonFiniteError


def open_data(config: Config, *, require_labels: bool = True) -> tuple[data.Source, data.Source]:
    """The train and test sources, with one list of classes."""
    paths = {"data.train": config.data.train, "data.test": config.data.test}
    missing = [key for key, path in paths.items() if path is None]
    if missing:
        raise ValueError(f"{' and '.join(missing)} is not set; give a folder of shards (see docs/data.md)")
    assert config.data.train is not None
    assert config.data.test is not None
    whole = data.open_source(config.data.train, require_labels=require_labels)
    test = data.open_source(config.data.test, classes=whole.classes, require_labels=require_labels)
    if config.data.subset is None:
        return whole, test
    return data.Subset(whole, _read_subset(config.data.subset, len(whole))), test


def _read_subset(path: str, num_samples: int) -> npt.NDArray[np.int64]:
    try:
        places = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"data.subset {path} cannot be read as a .npy file: {error}") from error
    if places.ndim != 1 or not np.issubdtype(places.dtype, np.integer) or not len(places):
        raise ValueError(
            f"data.subset {path} holds {places.dtype} {places.shape}; it needs a list of sample numbers"
        )
    if places.min() < 0 or places.max() >= num_samples:
        raise ValueError(
            f"data.subset {path} names samples {places.min()} to {places.max()}; data.train has 0 to "
            f"{num_samples - 1}"
        )
    return places.astype(np.int64)


def build_backbone(config: Config, *, in_file: bool = False) -> Backbone:
    """The frozen encoder, on the CPU; one that takes the crops' sizes where the objective is on crops.

    Args:
        in_file: leave the weights in their file, for an engine that takes its share of them.
    """
    section = config.backbone
    backbone = load_backbone(
        section.name,
        pretrained=section.pretrained,
        weights=section.weights,
        image_size=section.image_size,
        kwargs=section.kwargs,
        remove=section.remove,
        mean=section.mean,
        std=section.std,
        crop_pct=section.crop_pct,
        random=section.random,
        seed=config.seed,
        in_file=in_file,
    )
    if config.objective.name == "swav" and config.method in ("mask", "finetune", "cascade"):
        from selfmask_dist.backbones.any_size import accept_sizes  # imports timm

        sizes = {crops.size for crops in crop_sizes(config, backbone.spec.preprocessing)}
        accept_sizes(backbone.encoder, sizes, name=backbone.spec.name)
    return backbone


def crop_sizes(config: Config, preprocessing: Preprocessing) -> tuple[data.Crops, ...]:
    section = config.crops
    large = data.Crops(
        section.global_count, section.global_size or preprocessing.image_size, section.global_scale
    )
    if not section.local_count:
        return (large,)
    return large, data.Crops(section.local_count, section.local_size, section.local_scale)


def train_transform(config: Config, preprocessing: Preprocessing) -> data.Transform:
    """The views of training: multi-crops for SwAV, else one crop, or the evaluation's where `data.augment` is
    off.
    """
    section = config.data
    if config.objective.name == "swav":
        return _multicrop(config, preprocessing)
    if not section.augment:
        return data.eval_transform(preprocessing)
    return data.train_transform(preprocessing, crop_scale=section.crop_scale, flip=section.flip)


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
) -> objectives.Objective:
    options: dict[str, Any] = {"seed": config.seed}
    if config.objective.name == "swav":
        section = config.swav
        options["options"] = objectives.SwavOptions(
            num_prototypes=section.prototypes,
            dim=section.dim,
            temperature=section.temperature,
            epsilon=section.epsilon,
            iterations=section.sinkhorn_iterations,
            queue_length=section.queue_length,
            queue_start=round(section.queue_start_epoch * steps_per_epoch),
            freeze_steps=section.freeze_steps,
        )
    else:
        supervised = config.objective
        options |= {
            "head": supervised.head,
            "head_norm": supervised.head_norm,
            "label_smoothing": supervised.label_smoothing,
            "prompts": supervised.prompts,
        }
        if supervised.distill_from is not None:
            from selfmask_dist.teacher import Teacher  # which makes a run's parts with this module

            options["distillation"] = objectives.Distillation(
                Teacher(Path(supervised.distill_from), classes),
                weight=supervised.distill_weight,
                temperature=supervised.distill_temperature,
            )
    return objectives.build_objective(
        config.objective.name, backbone=backbone, classes=classes, context=context, **options
    )


@dataclass(frozen=True)
class Trained:
    """What is trained: masks on the encoder (and on a masked head), or plain weights."""

    masks: Masks | None
    head_masks: Masks | None
    summary: str


def engine_options(config: Config) -> EngineOptions:
    section = config.engine
    return EngineOptions(
        name=section.name,
        precision=section.precision,
        reduce_dtype=section.reduce_dtype,
        compile=section.compile,
        checkpoint_activations=section.checkpoint_activations,
        reshard_after_forward=section.reshard_after_forward,
        shard_size=section.shard_size,
        cpu_offload=section.cpu_offload,
        bucket_mb=section.bucket_mb,
        zero_stage=section.zero_stage,
        deepspeed=section.deepspeed,
        accumulate=config.train.accumulate,
        clip_norm=config.optim.clip_norm,
    )


def mask_family(config: Config, *, num_steps: int) -> Family:
    """The family of masks, with its options.

    Args:
        num_steps: of the whole training, which a schedule of the kept share follows.
    """
    section = config.mask
    return build_family(
        section.family,
        threshold=section.threshold,
        scale=section.scale,
        keep=section.keep,
        keep_scope=section.keep_scope,
        keep_schedule=section.keep_schedule,
        keep_steps=round((section.keep_until - section.keep_from) * num_steps),
        keep_warmup=round(section.keep_from * num_steps),
        penalty=section.penalty,
        block_rows=section.block_rows,
        block_columns=section.block_columns,
        maskable=section.maskable,
        maskable_by=section.maskable_by,
        seed=config.seed,
    )


def prepare(
    config: Config, engine: Engine, objective: objectives.Objective, *, num_steps: int = 1
) -> Trained:
    """Attach masks or free the weights, build the optimizer with one named group for each kind of parameter,
    and start the engine.

    Args:
        num_steps: of the whole training.
    """
    optim, groups = config.optim, []
    masks = head_masks = None
    if config.method == "mask":
        section = config.mask
        family = mask_family(config, num_steps=num_steps)
        attach_masks = partial(engine.attach, attach_fn=attach, init=section.init)
        masks = attach_masks(
            engine.encoder,
            family=family,
            first_layers=section.first_layers,
            include=section.include,
            exclude=section.exclude,
            split_qkv=section.split_qkv,
            allow_norm=section.allow_norm,
            **second_weights(config, family),
        )
        groups += mask_groups(config, masks)
        if config.objective.head == "masked":
            of_head = type(family)(replace(family.options, maskable=1.0))  # which is of the backbone
            head_masks = attach_masks(objective, family=of_head, include="head.*")
            groups.append(
                {"name": "head_scores", "params": list(head_masks.parameters()), "base_lr": optim.score_lr}
            )
        summary = masks.summary()
    else:
        weights = engine.free(engine.encoder)
        groups.append(weight_group(config, weights))
        summary = f"trained  {sum(p.numel() for p in weights):,} weights of the backbone"
    if head_masks is None and (head := objective.head_parameters()):
        group = {
            "name": "head",
            "params": head,
            "base_lr": optim.head_lr,
            "weight_decay": optim.head_weight_decay,
        }
        groups.append(group)
        summary += f"\nhead     {sum(p.numel() for p in head):,} weights"
    for group in groups:
        group["lr"] = group["base_lr"]
    optimizer = torch.optim.SGD(groups, momentum=optim.momentum)
    optimizer.register_step_pre_hook(partial(_hold, objective))
    engine.keep_unit_rows(objective.unit_rows())
    engine.start(optimizer)
    return Trained(masks, head_masks, summary)


def _hold(objective: objectives.Objective, *_: Any) -> None:
    for parameter in objective.held_parameters():
        parameter.grad = None


def load_first_state(engine: Engine, run: Path, *, fingerprint: str) -> None:
    """Scores, heads and running statistics of a finished run, without its momentum. Collective.

    Raises:
        ValueError: it has no checkpoint, one of another backbone, or one of other parameters.
    """
    found = load_newest(
        run / "checkpoints", report=lambda text: print(text, file=sys.stderr), set_aside=False
    )
    if found is None:
        raise ValueError(f"mask.init_from: {run} has no valid checkpoint")
    checkpoint = found[0]
    if checkpoint.values["identity"]["backbone"] != fingerprint:
        raise ValueError(f"mask.init_from: {run} was trained on another backbone or other weights")
    parts: dict[str, dict[str, Tensor]] = {"parameters": {}, "statistics": {}}
    for key, tensor in checkpoint.tensors.items():
        part, _, name = key.partition("/")
        if part in parts:
            parts[part][name] = tensor
    engine.load_state(EngineState(parts["parameters"], {}, parts["statistics"]))


class TrainStep(nn.Module):
    """Batch -> (this rank's share of the loss, metrics): the module that an engine runs."""

    def __init__(
        self,
        encoder: nn.Module,
        objective: objectives.Objective,
        *,
        batchnorm: Literal["train", "sync", "frozen"],
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.objective = objective
        self.batchnorm = batchnorm
        self.train()

    def train(self, mode: bool = True) -> "TrainStep":
        super().train(mode)
        if mode:
            set_train_mode(self.encoder, batchnorm="frozen" if self.batchnorm == "frozen" else "train")
        return self

    def forward(self, batch: data.Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = self.objective(self.encoder, batch)
        return loss, metrics


class MaskTelemetry:
    """Active share, flips and near-threshold mass at a logged step; stops a run whose scores are not
    finite.
    """

    def __init__(self, masks: Masks) -> None:
        self._masks = masks
        self._before: dict[str, Tensor] | None = None

    def before_step(self) -> None:
        self._before = self._masks.mask_pieces()

    def after_step(self) -> dict[str, Any]:
        statistics = measure(self._masks, before=self._before)
        if statistics.num_nonfinite:
            raise NonFiniteError(
                f"{statistics.num_nonfinite} scores are not finite: a gradient overflowed since the last "
                f"log. Lower "
                f"optim.score_lr or set optim.clip_norm"
            )
        return {
            "mask/active": statistics.active,
            "mask/flips": statistics.flips,
            "mask/near_threshold": statistics.near_threshold,
            "mask/empty": list(statistics.empty),
            "mask/active_by_parameter": statistics.active_by_parameter,
        }
