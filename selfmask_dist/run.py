"""One run from its configuration to its result: the place where all parts are wired.

    frozen baseline -> attach masks -> train -> evaluate -> save the mask and result.json

`method` picks what is trained: mask (scores), finetune (all weights), probe (a linear probe on frozen
features) or frozen (nothing). Every other module knows only its own part.
"""

import faulthandler
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from selfmask_dist import data, objectives
from selfmask_dist.api import Masks, attach, save_masks
from selfmask_dist.backbones import Backbone, load_backbone, set_train_mode
from selfmask_dist.checkpoint import Checkpoint, Retention, Saver, load_newest, read_checkpoint
from selfmask_dist.config import Config
from selfmask_dist.evaluation import Evaluation
from selfmask_dist.masking import measure
from selfmask_dist.meter import Meter
from selfmask_dist.metrics import MetricsWriter
from selfmask_dist.parallel import (
    Engine,
    EngineOptions,
    World,
    build_engine,
    join_world,
    synchronise_batchnorm,
)
from selfmask_dist.preempt import Preempted, StopRequest
from selfmask_dist.run_directory import create_run_directory, drop_metrics_after, run_path, write_json
from selfmask_dist.schedule import Schedule
from selfmask_dist.state import Keeper, Position, RunState
from selfmask_dist.status import Heartbeat
from selfmask_dist.trainer import NonFiniteError, Trainer
from selfmask_dist.watchdog import Watchdog


def run(config: Config) -> dict[str, Any]:
    """Run a configuration to its end and return what `result.json` holds. Every process of the run calls
    this.

    Raises:
        ValueError: the configuration, the data or the backbone cannot be used; the message says which and how
            to mend it.
        NonFiniteError: training diverged.
    """
    faulthandler.enable()  # a crash shows where
    directory = run_path(config)
    stacks = directory / "stacks" / f"rank-{os.environ.get('RANK', 0)}.txt"
    with (
        StopRequest(force_after=config.checkpoint.stop_seconds, stacks=stacks) as stop,
        join_world(
            config.engine.device, threads=config.engine.threads, needs_group=config.engine.name != "ddp"
        ) as world,
    ):
        if world.is_main:
            create_run_directory(config, is_restart=bool(int(os.environ.get("SELFMASK_RESTARTS", 0))))
        world.barrier()
        if (directory / "result.json").exists():  # requeued after its end
            finished: dict[str, Any] = json.loads((directory / "result.json").read_text())
            return finished
        found = find_checkpoint(directory, world)
        if world.is_main:
            drop_metrics_after(directory, found.values["position"]["step"] if found else 0)
        writer = MetricsWriter(
            directory if world.is_main else None,
            progress=config.run.progress,
            wandb_mode=config.run.wandb,
            wandb_project=config.run.wandb_project,
            config=config.model_dump(mode="json"),
        )
        heartbeat = Heartbeat(directory, lambda: writer.newest) if world.is_main else None
        with (
            writer,
            Watchdog(
                timeout=config.checkpoint.hang_minutes * 60,
                stacks=stacks,
                heartbeat=heartbeat.write if heartbeat else None,
            ) as watchdog,
        ):
            life = Life(stop, watchdog, heartbeat)
            try:
                result = _run(config, world, writer, directory, life, found)
            except Preempted:
                reason = stop.reason or "another rank's signal"
                writer.event("preempted", reason=reason, step=writer.newest.get("step"))
                is_preempted = True
            except BaseException:
                life.tell(state="failed")
                raise
            else:
                is_preempted = False
        life.tell(state="preempted" if is_preempted else "finished")
        if is_preempted:
            raise Preempted  # outside of the writer, which would call it a failure
        return result


@dataclass(frozen=True)
class Life:
    """What keeps a process honest while it works: the request to stop, the watchdog, the heartbeat."""

    stop: StopRequest
    watchdog: Watchdog
    heartbeat: Heartbeat | None

    def check(self, world: World) -> None:
        """Between two batches of an evaluation. Collective: every rank must call.

        Raises:
            Preempted: some rank was asked to stop.
        """
        self.watchdog.beat()
        votes = torch.tensor([float(self.stop.requested)], device=world.device)
        if world.sum(votes).item():
            raise Preempted

    def tell(self, **facts: Any) -> None:
        if self.heartbeat is not None:
            self.heartbeat.write(**facts)


def find_checkpoint(directory: Path, world: World) -> Checkpoint | None:
    """The newest valid checkpoint of a run, the same on every rank. Collective: every rank must call."""
    name: list[str | None] = [None]
    if world.is_main:
        found = load_newest(directory / "checkpoints", report=lambda text: print(text, file=sys.stderr))
        name = [found[1].name if found else None]
    if world.size > 1:
        dist.broadcast_object_list(name, src=0)
    if name[0] is None:
        return None
    return read_checkpoint(directory / "checkpoints" / name[0])


def _run(
    config: Config,
    world: World,
    writer: MetricsWriter,
    directory: Path,
    life: Life,
    found: Checkpoint | None,
) -> dict[str, Any]:
    train, test = open_data(config)
    backbone = build_backbone(config)
    backbone.encoder.to(world.device)
    evaluation = Evaluation(config, backbone, train, test, world, on_batch=lambda: life.check(world))
    writer.event("start", world_size=world.size, train_samples=len(train), test_samples=len(test))
    writer.message(_describe(config, backbone, train, test, world))

    result: dict[str, Any] = {
        "method": config.method,
        "backbone": backbone.spec.name,
        "fingerprint": backbone.spec.fingerprint,
    }
    if config.eval.frozen_baseline or config.method in ("probe", "frozen"):
        result["frozen"] = _once(
            directory / "frozen.json",
            world,
            lambda: evaluation.full(probe=config.eval.probe or config.method == "probe"),
        )
        writer.message(f"frozen backbone: {_format(result['frozen'])}")
    if config.method in ("mask", "finetune"):
        result |= _adapt(config, backbone, train, evaluation, world, writer, directory, life, found)
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
    life: Life,
    found: Checkpoint | None,
) -> dict[str, Any]:
    """Train masks or weights, evaluate and save."""
    objective = build_objective(config, backbone, train.classes).to(world.device)
    if config.backbone.batchnorm == "sync":
        synchronise_batchnorm(backbone.encoder)
    module = TrainStep(backbone.encoder, objective, batchnorm=config.backbone.batchnorm)
    engine = build_engine(
        module,
        encoder=backbone.encoder,
        blocks=backbone.spec.blocks,
        world=world,
        options=engine_options(config),
    )
    trained = prepare(config, engine, objective)
    writer.message(trained.summary)
    loader = data.train_loader(
        train,
        evaluation.train_transform(),
        global_batch_size=config.train.global_batch_size,
        seed=config.seed,
        rank=world.rank,
        world_size=world.size,
        num_workers=config.engine.workers,
    )

    def batches_of(epoch: int, first: int) -> data.BatchLoader:
        loader.set_epoch(epoch, first_step=first)
        return loader

    schedule_steps = max(round(config.train.epochs * len(loader)), 1)
    steps = min(schedule_steps, config.train.max_steps or schedule_steps)
    identity = {
        "backbone": backbone.spec.fingerprint,
        "training images": len(train),
        "method": config.method,
        "steps in an epoch": len(loader),
    }
    state, meter = RunState(engine, objective, identity=identity), Meter(world)
    start = _resume(state, found, engine, batches_of, meter, writer)
    keeper = build_keeper(config, state, life, writer, directory if world.is_main else None)
    life.tell(num_steps=steps)
    trainer = Trainer(
        engine=engine,
        optimizer=engine.optimizer,
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
        keeper=keeper,
        on_step=life.watchdog.beat,
    )
    trainer.run(start, meter)
    keeper.finish()
    result: dict[str, Any] = {"steps": steps, "adapted": evaluation.full(probe=config.eval.probe)}
    result["adapted"] |= evaluation.head(objective)
    writer.message(f"{config.method}: {_format(result['adapted'])}")
    result |= save(trained, backbone, objective, directory, engine=engine, metrics=result["adapted"])
    return result


def _resume(
    state: RunState,
    found: Checkpoint | None,
    engine: Engine,
    batches_of: Callable[[int, int], data.BatchLoader],
    meter: Meter,
    writer: MetricsWriter,
) -> Position:
    """Restore the checkpoint that was found; the start where there is none."""
    if found is None:
        return Position()
    state.check(found)
    if found.values["position"]["step"]:
        # an engine's first step may differ from all later ones by rounding (DistributedDataParallel lays out
        # its buckets anew after it), so a resumed run rehearses one; what it moved is then overwritten
        engine.forward_backward(next(iter(batches_of(0, 0))))
        engine.optimizer.zero_grad()
    position = state.restore(found, telemetry=meter)
    writer.event("resume", step=position.step)
    writer.message(f"resumed  from the checkpoint of step {position.step}")
    return position


def build_keeper(
    config: Config, state: RunState, life: Life, writer: MetricsWriter, directory: Path | None
) -> Keeper:
    """`directory`: the run's on the main rank, else None."""
    section = config.checkpoint
    saver = None
    if directory is not None:
        retention = Retention(section.keep_last, section.keep_every, section.keep_best)
        saver = Saver(
            directory / "checkpoints",
            retention,
            on_commit=lambda path, seconds: writer.event(
                "checkpoint", path=path.name, seconds=seconds, stalled=keeper.stalled
            ),
            on_failure=lambda text: writer.message(f"WARNING: {text}"),
        )
    keeper = Keeper(
        state,
        life.stop,
        saver=saver,
        every_steps=section.every_steps,
        every_seconds=section.every_minutes * 60,
        is_asynchronous=section.asynchronous,
    )
    return keeper


def _once(path: Path, world: World, measure_fn: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Numbers that a restart finds in a file. Collective: every rank must call."""
    exists = torch.tensor([float(world.is_main and path.exists())], device=world.device)
    if world.sum(exists).item():
        known: dict[str, float] = json.loads(path.read_text())
        return known
    values = measure_fn()
    if world.is_main:
        write_json(path, values)
    return values


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
        self._warned: set[str] = set()

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
