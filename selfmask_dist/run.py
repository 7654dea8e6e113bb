"""One run from its configuration to its result: the place where all parts are wired.

    frozen baseline -> attach masks -> train -> evaluate -> save the mask and result.json

`method` picks what is trained: mask (scores), finetune (all weights), probe (a linear probe on frozen
features) or frozen (nothing). Every other module knows only its own part.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from selfmask_dist import data, objectives
from selfmask_dist.api import Masks, attach
from selfmask_dist.backbones import Backbone, load_backbone, set_train_mode
from selfmask_dist.config import Config
from selfmask_dist.evaluation import Evaluation
from selfmask_dist.masking import measure
from selfmask_dist.metrics import MetricsWriter
from selfmask_dist.parallel import DDPEngine, World, join_world
from selfmask_dist.run_directory import create_run_directory, run_path, write_json
from selfmask_dist.schedule import Schedule
from selfmask_dist.trainer import NonFiniteError, Trainer


def run(config: Config) -> dict[str, Any]:
    """Run a configuration to its end and return what `result.json` holds. Every process of the run calls
    this.

    Raises:
        ValueError: the configuration, the data or the backbone cannot be used; the message says which and how
            to mend it.
        NonFiniteError: training diverged.
    """
    with join_world(config.engine.device, threads=config.engine.threads) as world:
        directory = run_path(config)
        if world.is_main:
            create_run_directory(config)
        world.barrier()
        writer = MetricsWriter(
            directory if world.is_main else None,
            progress=config.run.progress,
            wandb_mode=config.run.wandb,
            wandb_project=config.run.wandb_project,
            config=config.model_dump(mode="json"),
        )
        with writer:
            return _run(config, world, writer, directory)


def _run(config: Config, world: World, writer: MetricsWriter, directory: Path) -> dict[str, Any]:
    train, test = open_data(config)
    backbone = build_backbone(config)
    backbone.encoder.to(world.device)
    evaluation = Evaluation(config, backbone, train, test, world)
    writer.event("start", world_size=world.size, train_samples=len(train), test_samples=len(test))
    writer.message(_describe(config, backbone, train, test, world))

    result: dict[str, Any] = {
        "method": config.method,
        "backbone": backbone.spec.name,
        "fingerprint": backbone.spec.fingerprint,
    }
    if config.eval.frozen_baseline or config.method in ("probe", "frozen"):
        result["frozen"] = evaluation.full(probe=config.eval.probe or config.method == "probe")
        writer.message(f"frozen backbone: {_format(result['frozen'])}")
    if config.method in ("mask", "finetune"):
        result |= _adapt(config, backbone, train, evaluation, world, writer, directory)
    if world.is_main:
        write_json(directory / "result.json", result)
    writer.event("end", **result)
    return result


def _adapt(
    config: Config,
    backbone: Backbone,
    train: data.Source,
    evaluation: Evaluation,
    world: World,
    writer: MetricsWriter,
    directory: Path,
) -> dict[str, Any]:
    """Train masks or weights, evaluate and save."""
    objective = build_objective(config, backbone, train.classes).to(world.device)
    trained = prepare(config, backbone.encoder, objective)
    writer.message(trained.summary)
    quarantine = data.Quarantine(
        directory / "quarantine.jsonl",
        num_samples=len(train),
        budget=config.data.max_broken,
        rank=world.rank,
    )
    loader = data.train_loader(
        train,
        evaluation.train_transform(),
        global_batch_size=config.train.global_batch_size,
        seed=config.seed,
        rank=world.rank,
        world_size=world.size,
        num_workers=config.engine.workers,
        quarantine=quarantine,
    )

    def batches_of(epoch: int) -> data.BatchLoader:
        loader.set_epoch(epoch)
        return loader

    schedule_steps = max(round(config.train.epochs * len(loader)), 1)
    steps = min(schedule_steps, config.train.max_steps or schedule_steps)
    module = TrainStep(backbone.encoder, objective, batchnorm=config.backbone.batchnorm)
    if config.engine.compile:
        module.compile()
    trainer = Trainer(
        engine=DDPEngine(
            module,
            trained.optimizer,
            world,
            precision=config.engine.precision,
            accumulate=config.train.accumulate,
            clip_norm=config.optim.clip_norm,
        ),
        optimizer=trained.optimizer,
        num_steps=steps,
        schedule=Schedule(
            schedule_steps, round(config.optim.warmup_epochs * len(loader)), config.optim.schedule
        ),
        epoch_batches=batches_of,
        writer=writer,
        directory=directory,
        telemetry=MaskTelemetry(trained.masks) if trained.masks is not None else None,
        monitor=evaluation.monitor if config.eval.knn_every else None,
        monitor_every=max(round(config.eval.knn_every * len(loader)), 1) if config.eval.knn_every else 0,
        log_every=config.run.log_every,
        sample_key=train.key,
        quarantine=quarantine,
    )
    trainer.run()
    result: dict[str, Any] = {"steps": steps, "adapted": evaluation.full(probe=config.eval.probe)}
    result["adapted"] |= evaluation.head(objective)
    writer.message(f"{config.method}: {_format(result['adapted'])}")
    if world.is_main:
        result |= save(trained, backbone, objective, directory, metrics=result["adapted"])
    return result


# ---- parts, each also of use to a caller with a loop of its own


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
    """What is trained and by which optimizer: masks on the encoder (and on a masked head), or plain
    weights.
    """

    optimizer: torch.optim.Optimizer
    masks: Masks | None
    head_masks: Masks | None
    summary: str


def prepare(config: Config, encoder: nn.Module, objective: objectives.Objective) -> Trained:
    """Attach masks or free the weights, and build the optimizer with one named group for each kind of
    parameter.
    """
    optim, groups = config.optim, []
    masks = head_masks = None
    if config.method == "mask":
        section = config.mask
        attach_masks = partial(attach, threshold=section.threshold, init=section.init, scale=section.scale)
        masks = attach_masks(
            encoder,
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
        encoder.requires_grad_(True)
        weights = list(encoder.parameters())
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
    optimizer = torch.optim.SGD(groups, momentum=optim.momentum)
    for attached in (masks, head_masks):
        if attached is not None:
            attached.bind(optimizer)
    return Trained(optimizer, masks, head_masks, summary)


class TrainStep(nn.Module):
    """Batch -> (this rank's share of the loss, metrics): the module that an engine runs."""

    def __init__(
        self, encoder: nn.Module, objective: objectives.Objective, *, batchnorm: Literal["train", "frozen"]
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.objective = objective
        self.batchnorm = batchnorm
        self.train()

    def train(self, mode: bool = True) -> "TrainStep":
        super().train(mode)
        if mode:
            set_train_mode(self.encoder, batchnorm=self.batchnorm)
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
        self._warned: set[str] = set()

    def before_step(self) -> None:
        self._before = self._masks.masks()

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
    metrics: dict[str, float],
) -> dict[str, Any]:
    """Write the mask file (or the fine-tuned weights) and the head; returns their sizes in bytes."""
    sizes: dict[str, Any] = {}
    if trained.masks is not None:
        num_weights = sum(entry.theta.numel() for entry in trained.masks.entries)
        mask_bytes = trained.masks.save(
            directory / "final.mask",
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
        save_file(_plain(backbone.encoder.state_dict()), directory / "encoder.safetensors")
    if trained.head_masks is not None:
        trained.head_masks.save(directory / "head.mask")
    head = _plain(objective.state_dict())
    if head:
        save_file(head, directory / "head.safetensors")
    return sizes


def _pruned(masks: Masks) -> list[float]:
    sparsity = masks.sparsity()
    return [sparsity[entry.name] * entry.theta.numel() for entry in masks.entries]


def _plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def _describe(config: Config, backbone: Backbone, train: data.Source, test: data.Source, world: World) -> str:
    spec = backbone.spec
    return (
        f"run      {run_path(config)}: {config.method} on {world.size} process(es), {world.device.type}\n"
        f"backbone {spec.name}: {spec.num_parameters:,} weights, dim {spec.dim}, "
        f"{spec.preprocessing.image_size} px, "
        f"fingerprint {spec.fingerprint[:12]}\n"
        f"data     {len(train):,} train and {len(test):,} test images, {len(train.classes)} classes"
    )


def _format(values: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in values.items())
