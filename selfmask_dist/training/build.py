"""The parts of a run, each made from its section of the configuration: data, backbone, objective, masks.

Wiring without an order of events (that is `run`); each function is also of use to a caller with a loop of its
own.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from selfmask_dist import data, objectives
from selfmask_dist.backbones import Backbone, load_backbone, set_train_mode
from selfmask_dist.config import Config
from selfmask_dist.config.objectives import VIEWS
from selfmask_dist.maskfile.api import Masks, attach
from selfmask_dist.masking import Family, build_family, measure
from selfmask_dist.parallel import Engine
from selfmask_dist.parallel.trained import EngineState
from selfmask_dist.runs.checkpoint import load_newest
from selfmask_dist.training.finetune import choose_weights
from selfmask_dist.training.hold import Hold
from selfmask_dist.training.mask_groups import mask_groups, second_weights, weight_group
from selfmask_dist.training.trainer import NonFiniteError
from selfmask_dist.training.views import crop_sizes


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
    chosen = _subset("data.subset", config.data.subset, whole)
    return chosen, _subset("data.test_subset", config.data.test_subset, test)


def _subset(key: str, path: str | None, source: data.Source) -> data.Source:
    return source if path is None else data.Subset(source, _read_subset(key, path, len(source)))


def _read_subset(key: str, path: str, num_samples: int) -> npt.NDArray[np.int64]:
    try:
        places = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{key} {path} cannot be read as a .npy file: {error}") from error
    if places.ndim != 1 or not np.issubdtype(places.dtype, np.integer) or not len(places):
        raise ValueError(
            f"{key} {path} holds {places.dtype} {places.shape}; it needs a list of sample numbers"
        )
    if places.min() < 0 or places.max() >= num_samples:
        whole = "data.test" if key == "data.test_subset" else "data.train"
        raise ValueError(
            f"{key} {path} names samples {places.min()} to {places.max()}; {whole} has 0 to {num_samples - 1}"
        )
    return places.astype(np.int64)


def build_backbone(config: Config, *, in_file: bool = False) -> Backbone:
    """The frozen encoder, on the CPU; one that takes the crops' sizes where the objective is on crops.

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


def build_objective(
    config: Config,
    backbone: Backbone,
    classes: tuple[str, ...],
    context: objectives.Context,
    *,
    steps_per_epoch: int,
) -> objectives.Objective:
    num_steps = round(config.train.epochs * steps_per_epoch)
    context = replace(context, steps_per_epoch=steps_per_epoch, num_steps=num_steps)
    teacher: objectives.DistillTeacher | None = None
    if config.objective.name == "supervised" and config.objective.distill_from is not None:
        from selfmask_dist.training.distill import Teacher  # which makes a run's parts with this module

        teacher = Teacher(Path(config.objective.distill_from), classes)
    return objectives.build_objective(
        config, backbone=backbone, classes=classes, context=context, distill_teacher=teacher
    )


@dataclass(frozen=True)
class Trained:
    """What is trained: masks on the encoder (and on a masked head), or plain weights."""

    masks: Masks | None
    head_masks: Masks | None
    summary: str
    weights: tuple[str, ...] = ()  # names of the backbone's that are trained as they are
    statistics: Mapping[str, Tensor] = field(default_factory=dict)  # the backbone's, before training


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
    groups: list[dict[str, Any]] = []
    masks = head_masks = None
    names: list[str] = []
    if config.method == "mask":
        masks, head_masks = _attach_masks(config, engine, objective, groups, num_steps=num_steps)
        summary = masks.summary()
    else:
        names = choose_weights(engine.encoder, config.finetune.train, freeze=config.finetune.freeze)
        weights = engine.free(engine.encoder, names)
        groups.append(weight_group(config, weights))
        count = sum(parameter.numel() for parameter in weights)
        summary = f"trained  {count:,} weights of the backbone ({len(names)} tensors)"
    if head_masks is None and (head := objective.head_parameters()):
        group = {
            "name": "head",
            "params": head,
            "base_lr": config.optim.head_lr,
            "weight_decay": config.optim.head_weight_decay,
        }
        groups.append(group)
        summary += f"\nhead     {sum(p.numel() for p in head):,} weights"
    for group in groups:
        group["lr"] = group["base_lr"]
    optimizer = _build_optimizer(config, groups)
    optimizer.register_step_pre_hook(partial(_hold, objective))
    optimizer.register_step_pre_hook(_wait)
    engine.keep_unit_rows(objective.unit_rows())
    engine.start(optimizer)
    if (heads := objective.teacher_parameters()) is not None:
        objective.teacher = engine.keep_teacher(heads)
    statistics = {name: buffer.clone() for name, buffer in engine.encoder.named_buffers()} if names else {}
    return Trained(masks, head_masks, summary, tuple(names), statistics)


def _attach_masks(
    config: Config,
    engine: Engine,
    objective: objectives.Objective,
    groups: list[dict[str, Any]],
    *,
    num_steps: int,
) -> tuple[Masks, Masks | None]:
    """Masks on the encoder and, where it is to have one, on the head; what they train goes into `groups`."""
    section = config.mask
    head_masks = None
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
        parameters = list(head_masks.parameters())
        groups.append({"name": "head_scores", "params": parameters, "base_lr": config.optim.score_lr})
    return masks, head_masks


def _build_optimizer(config: Config, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    optim = config.optim
    if optim.kind == "adamw":
        # weight decay is each group's own; torch's default for AdamW would pull the scores to the threshold
        return torch.optim.AdamW(groups, betas=(optim.momentum, optim.beta2), weight_decay=0.0)
    return torch.optim.SGD(groups, momentum=optim.momentum)


def _hold(objective: objectives.Objective, *_: Any) -> None:
    for parameter in objective.held_parameters():
        parameter.grad = None


def _wait(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """A group whose time has not come gathers no momentum either."""
    for group in optimizer.param_groups:
        if group["lr"] == 0:
            for parameter in group["params"]:
                parameter.grad = None


def hold_weights(config: Config, engine: Engine) -> None:
    """Keep what `procedure.hold` says, from the engine's present weights on.

    Raises:
        ValueError: the file cannot be read, or does not fit the encoder.
    """
    path = config.procedure.hold
    if path is None:
        return
    try:
        codes = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"procedure.hold: {path} cannot be read: {error}") from error
    Hold(engine.encoder, codes).bind(engine.optimizer)


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


def lora_options(config: Config) -> dict[str, Any]:
    """The arguments of `add_lora`."""
    section = config.finetune
    return {
        "rank": section.lora_rank,
        "alpha": section.lora_alpha,
        "targets": list(section.lora_targets),
        "seed": config.seed,
    }
