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
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from selfmask_dist import data
from selfmask_dist.assembly import (
    MaskTelemetry,
    TrainStep,
    build_backbone,
    build_objective,
    engine_options,
    open_data,
    prepare,
    save,
)
from selfmask_dist.backbones import Backbone
from selfmask_dist.checkpoint import Checkpoint, Retention, Saver, load_newest, read_checkpoint
from selfmask_dist.config import Config
from selfmask_dist.evaluation import Evaluation
from selfmask_dist.meter import Meter
from selfmask_dist.metrics import MetricsWriter
from selfmask_dist.parallel import (
    Engine,
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
from selfmask_dist.trainer import Trainer
from selfmask_dist.watchdog import Watchdog


def run(config: Config) -> dict[str, Any]:
    """Run a configuration to its end and return what `result.json` holds. Every process of the run calls
    this.

    Raises:
        ValueError: the configuration, the data or the backbone cannot be used; the message says which and how
            to mend it.
        NonFiniteError: training diverged.
    """
    faulthandler.enable(sys.__stderr__ or sys.stderr)  # a crash shows where; a notebook replaces sys.stderr
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
        worker_kind=config.engine.worker_kind,
        quarantine=quarantine,
    )

    def batches_of(epoch: int, first: int) -> data.BatchLoader:
        loader.set_epoch(epoch, first_step=first)
        return loader

    schedule_steps = max(round(config.train.epochs * len(loader)), 1)
    steps = min(schedule_steps, config.train.max_steps or schedule_steps)
    identity = {
        "backbone": backbone.spec.fingerprint,
        "method": config.method,
        "steps in an epoch": len(loader),
    }
    state, meter = RunState(engine, objective, identity=identity, data=loader), Meter(world)
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
        quarantine=quarantine,
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
