"""The parts of a run, each made from its section of the configuration: data, backbone, objective, masks.

Wiring without an order of events (that is `run`); each function is also of use to a caller with a loop of its
own.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from selfmask_dist import data, objectives
from selfmask_dist.api import Masks, attach, save_masks
from selfmask_dist.backbones import Backbone, load_backbone, set_train_mode
from selfmask_dist.config import Config
from selfmask_dist.masking import measure
from selfmask_dist.parallel import Engine, EngineOptions
from selfmask_dist.trainer import NonFiniteError


def open_data(config: Config) -> tuple[data.Source, data.Source]:
    """The train and test sources, with one list of classes."""
    paths = {"data.train": config.data.train, "data.test": config.data.test}
    missing = [key for key, path in paths.items() if path is None]
    if missing:
        raise ValueError(f"{' and '.join(missing)} is not set; give a folder of shards (see docs/data.md)")
    assert config.data.train is not None
    assert config.data.test is not None
    train = data.open_source(config.data.train)
    return train, data.open_source(config.data.test, classes=train.classes)


def build_backbone(config: Config) -> Backbone:
    section = config.backbone
    return load_backbone(
        section.name,
        pretrained=section.pretrained,
        weights=section.weights,
        image_size=section.image_size,
        kwargs=section.kwargs,
        remove=section.remove,
        mean=section.mean,
        std=section.std,
        crop_pct=section.crop_pct,
        seed=config.seed,
    )


def build_objective(config: Config, backbone: Backbone, classes: tuple[str, ...]) -> objectives.Objective:
    section = config.objective
    return objectives.build_objective(
        section.name,
        backbone=backbone,
        classes=classes,
        head=section.head,
        head_norm=section.head_norm,
        label_smoothing=section.label_smoothing,
        prompts=section.prompts,
        seed=config.seed,
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


def prepare(config: Config, engine: Engine, objective: objectives.Objective) -> Trained:
    """Attach masks or free the weights, build the optimizer with one named group for each kind of parameter,
    and start the engine.
    """
    optim, groups = config.optim, []
    masks = head_masks = None
    if config.method == "mask":
        section = config.mask
        attach_masks = partial(
            engine.attach,
            attach_fn=attach,
            threshold=section.threshold,
            init=section.init,
            scale=section.scale,
        )
        masks = attach_masks(
            engine.encoder,
            include=section.include,
            exclude=section.exclude,
            split_qkv=section.split_qkv,
            allow_norm=section.allow_norm,
        )
        groups.append({"name": "scores", "params": list(masks.parameters()), "base_lr": optim.score_lr})
        if config.objective.head == "masked":
            head_masks = attach_masks(objective, include="head.*")
            groups.append(
                {"name": "head_scores", "params": list(head_masks.parameters()), "base_lr": optim.score_lr}
            )
        summary = masks.summary()
    else:
        weights = engine.free(engine.encoder)
        groups.append(
            {
                "name": "weights",
                "params": weights,
                "base_lr": optim.weight_lr,
                "weight_decay": optim.weight_decay,
            }
        )
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
    engine.start(torch.optim.SGD(groups, momentum=optim.momentum))
    return Trained(masks, head_masks, summary)


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


def save(
    trained: Trained,
    backbone: Backbone,
    objective: objectives.Objective,
    directory: Path,
    *,
    engine: Engine,
    metrics: dict[str, float],
) -> dict[str, Any]:
    """Write the mask file (or the fine-tuned weights) and the head; returns their sizes in bytes.

    Collective: every rank must call; the first one writes.
    """
    sizes: dict[str, Any] = {}
    is_main = engine.world.is_main
    if trained.masks is not None:
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
        weights = engine.whole_weights()
        if is_main:
            save_file(_plain(weights), directory / "encoder.safetensors")
    if trained.head_masks is not None:
        save_masks(trained.head_masks, directory / "head.mask", is_writer=is_main)
    head = _plain(objective.state_dict())
    if head and is_main:
        save_file(head, directory / "head.safetensors")
    return sizes


def _pruned(masks: Masks) -> list[float]:
    sparsity = masks.sparsity()
    return [sparsity[entry.name] * entry.theta.numel() for entry in masks.entries]


def _plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
