"""Train masks (or weights) of one run: every part made, the trainer run, the result measured and saved.

    objective + encoder -> engine -> masks -> loader -> trainer -> mask file

Wiring alone: the parts come from `build` and `prepare`, the loop is `trainer`.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from selfmask_dist import data
from selfmask_dist.backbones import Backbone
from selfmask_dist.common import names
from selfmask_dist.config import Config
from selfmask_dist.config.objectives import WITH_CAPTIONS
from selfmask_dist.evals.measure import Evaluation
from selfmask_dist.objectives import Context, Nbd, Objective
from selfmask_dist.objectives.base import TrainStep
from selfmask_dist.parallel import Engine, build_engine, synchronise_batchnorm
from selfmask_dist.runs.checkpoint import OpenCheckpoint, Retention, Saver, saving_peers
from selfmask_dist.runs.context import RunContext
from selfmask_dist.runs.decision import mark_of
from selfmask_dist.runs.speed.profile import StepProfiler
from selfmask_dist.runs.verdict import kept_text
from selfmask_dist.training.build import build_objective, lora_options, train_transform
from selfmask_dist.training.distill import DistillTeacher
from selfmask_dist.training.finetune import add_lora, add_peft
from selfmask_dist.training.habits.average import Average
from selfmask_dist.training.habits.pictures import with_mixing
from selfmask_dist.training.habits.watching import finish, keeps_by, monitor_of
from selfmask_dist.training.meter import MaskTelemetry, Meter
from selfmask_dist.training.prepare import begin_bank, hold_weights, load_first_state, prepare, search_bank
from selfmask_dist.training.retrieval.best_state import BestState
from selfmask_dist.training.retrieval.record import RetrievalRecord
from selfmask_dist.training.saving import Trainable, save
from selfmask_dist.training.schedule import Schedule, with_reached_rate
from selfmask_dist.training.state import CheckpointSchedule, Position, RunState
from selfmask_dist.training.trainer import Trainer
from selfmask_dist.training.whole.keep import keep_model

BatchesOf = Callable[[int, int], data.BatchLoader]


def adapt(
    config: Config,
    context: RunContext,
    backbone: Backbone,
    train: data.Source,
    evaluation: Evaluation,
    record: RetrievalRecord,
    found: OpenCheckpoint | None,
    measure_frozen: Callable[[], None],
) -> dict[str, Any]:
    """Train, measure and save; return what `result.json` is to hold of it. Collective: every rank must call.

    Args:
        record: of the instance retrieval of the frozen and of the adapted encoder.
        found: the checkpoint to go on from.
        measure_frozen: called when the engine has the encoder and nothing is trained yet.
    """
    quarantine = _open_quarantine(config, context, train)
    targets = evaluation.targets
    loader = _open_loader(config, context, backbone, train, quarantine, targets)
    objective, engine = _build(config, context, backbone, train, steps_per_epoch=len(loader), targets=targets)
    measure_frozen()
    config, steps, schedule = _plan_steps(config, context, backbone, len(loader))
    trained = _make_ready(config, context, backbone, objective, engine, num_steps=schedule.num_steps)
    if isinstance(objective, Nbd) and found is None:
        begin_bank(config, context, backbone, objective, train, quarantine)

    batches_of = partial(_batches_of, loader)
    average, best = _watchers(config, engine, objective)
    identity, meter = _identity(config, backbone, len(loader)), Meter(context.world)
    state = RunState(engine, objective, identity=identity, data=loader, best=best)
    start = _resume(state, found, engine, batches_of, meter, context, asked=config.run.resume)
    hold_weights(config, engine)
    checkpoints = build_checkpoint_schedule(config, state, context)
    context.update_status(num_steps=steps)
    trainer = Trainer(
        engine=engine,
        optimizer=engine.optimizer,
        num_steps=steps,
        schedule=schedule,
        epoch_batches=batches_of,
        writer=context.writer,
        directory=context.directory,
        telemetry=MaskTelemetry(trained.masks) if trained.masks is not None else None,
        monitor=monitor_of(evaluation, objective, average, best),
        monitor_every=config.eval.steps_between(len(loader)),
        log_every=config.run.log_every,
        before_step=partial(_before_step, objective, average),
        after_step=objective.after_step,
        remarks=objective.remarks,
        sample_key=train.key,
        checkpoints=checkpoints,
        on_step=context.watchdog.beat,
        has_ended=(lambda: False) if best is None else best.has_run_out,
        quarantine=quarantine,
        profiler=_profiler(config, context, steps),
    )
    made = _train(trainer, start, meter, checkpoints)
    if finish(best, average, evaluation, objective, step=made):
        # what goes on from a run's newest checkpoint finds there what its mask holds
        checkpoints.save_again(Position(made), meter)
    kept = {} if best is None else _describe_kept(best, context, made=made, planned=steps)
    checkpoints.close()
    result = _conclude(config, context, backbone, objective, engine, trained, evaluation, record)
    return result | {"steps": made, **kept}


def _batches_of(loader: data.BatchLoader, epoch: int, first: int) -> data.BatchLoader:
    loader.set_epoch(epoch, first_step=first)
    return loader


def _train(trainer: Trainer, start: Position, meter: Meter, checkpoints: CheckpointSchedule) -> int:
    """Return the number of steps that have been made."""
    try:
        return trainer.run(start, meter)
    finally:
        checkpoints.finish()  # ranks save together: none leaves while another one waits for it


def _watchers(
    config: Config, engine: Engine, objective: Objective
) -> tuple[Average | None, BestState | None]:
    """Return the moving average and the best state, where they are asked for."""
    average = None if config.train.ema is None else Average(engine, config.train.ema)
    if config.train.keep != "best":
        return average, None
    return average, BestState(engine, objective, by=keeps_by(config), patience=config.train.patience)


def _before_step(objective: Objective, average: Average | None, step: int) -> None:
    objective.start_step(step)
    if average is not None:
        average.before_step(step)


def _profiler(config: Config, context: RunContext, num_steps: int) -> StepProfiler | None:
    span, world = config.run.profile, context.world
    if span is None:
        return None
    if not span[0] < min(span[1], num_steps):
        raise ValueError(
            f"run.profile={list(span)} traces no step: it is [first, end] with first below end, and the run "
            f"has {num_steps} steps, from 0"
        )
    return StepProfiler(context.directory / names.PROFILE, world.rank, span, report=context.writer.message)


def _make_ready(
    config: Config,
    context: RunContext,
    backbone: Backbone,
    objective: Objective,
    engine: Engine,
    *,
    num_steps: int,
) -> Trainable:
    """Return what trains, as it starts: from nothing, or from the scores of an earlier run."""
    trained = prepare(config, engine, objective, num_steps=num_steps, blocks=backbone.spec.blocks)
    if config.mask.init_from is not None:
        load_first_state(engine, Path(config.mask.init_from), fingerprint=backbone.spec.fingerprint)
    context.writer.message(trained.summary)
    return trained


def _describe_kept(best: BestState, context: RunContext, *, made: int, planned: int) -> dict[str, Any]:
    """Say which state was kept, and return its entries of `result.json`."""
    kept = {"by": best.by, "value": best.value, "step": best.step, "made": made, "planned": planned}
    kept |= {"patience": best.patience} if best.patience is not None else {}
    context.writer.message(f"kept     {kept_text(kept)}")
    return {"kept_step": best.step, "kept": kept}


def _plan_steps(
    config: Config, context: RunContext, backbone: Backbone, per_epoch: int
) -> tuple[Config, int, Schedule]:
    """Return the configuration with its rate of scores, how many steps to make, and the learning rates'
    course, which `train.max_steps` does not cut.
    """
    steps = max(round(config.train.epochs * per_epoch), 1)
    optim = config.optim
    schedule = Schedule(
        steps,
        round(optim.warmup_epochs * per_epoch),
        optim.schedule,
        round(optim.head_first_epochs * per_epoch),
    )
    config, line = with_reached_rate(config, schedule, backbone.encoder)
    if line:
        context.writer.message(line)
    return config, min(steps, config.train.max_steps or steps), schedule


def _identity(config: Config, backbone: Backbone, per_epoch: int) -> dict[str, Any]:
    """Return what a resumed run must have in common with the one that saved."""
    identity = {
        "backbone": backbone.spec.fingerprint,
        "method": config.method,
        "steps in an epoch": per_epoch,
    }
    if config.optim.kind != "sgd":  # older checkpoints do not say it
        identity["optimizer"] = config.optim.kind
    return identity


def _open_quarantine(config: Config, context: RunContext, train: data.Source) -> data.Quarantine:
    return data.Quarantine(
        context.directory / names.QUARANTINE,
        num_samples=len(train),
        budget=config.data.max_broken,
        rank=context.world.rank,
    )


def _open_loader(
    config: Config,
    context: RunContext,
    backbone: Backbone,
    train: data.Source,
    quarantine: data.Quarantine,
    targets: data.Targets | None,
) -> data.BatchLoader:
    loader = data.train_loader(
        train,
        train_transform(config, backbone.spec.preprocessing),
        global_batch_size=config.train.global_batch_size,
        seed=config.seed,
        rank=context.world.rank,
        world_size=context.world.size,
        workers=data.Workers(config.engine.workers, config.engine.worker_kind),
        quarantine=quarantine,
    )
    if config.data.sampling == "balanced":
        loader = loader.with_balance()
    if targets is not None:
        loader = loader.with_targets(targets)
    loader = with_mixing(config, loader)
    return loader.with_captions() if config.objective.name in WITH_CAPTIONS else loader


def _build(
    config: Config,
    context: RunContext,
    backbone: Backbone,
    train: data.Source,
    *,
    steps_per_epoch: int,
    targets: data.Targets | None,
) -> tuple[Objective, Engine]:
    world = context.world
    ranks = Context(
        world.rank,
        world.size,
        config.train.global_batch_size,
        world.sum,
        world.sum_with_gradient,
        num_samples=len(train),
        all_to_all=world.all_to_all,
        targets=_summary(config, train, targets),
    )
    classes = train.classes if targets is None else targets.outputs
    teacher = None
    if config.objective.name == "supervised" and config.objective.distill_from is not None:
        teacher = DistillTeacher(Path(config.objective.distill_from), train.classes)
    objective = build_objective(
        config, backbone, classes, ranks, steps_per_epoch=steps_per_epoch, teacher=teacher
    )
    objective.to(world.device)
    if config.backbone.batchnorm == "sync":
        synchronise_batchnorm(backbone.encoder)
    if config.method == "finetune" and config.finetune.train == "lora":
        add_lora(backbone.encoder, **lora_options(config))  # before an engine cuts or wraps it
    if config.method == "finetune" and config.finetune.peft:
        add_peft(backbone.encoder, config.finetune.peft, seed=config.seed)
    engine = build_engine(
        TrainStep(backbone.encoder, objective, batchnorm=config.backbone.batchnorm),
        encoder=backbone.encoder,
        blocks=backbone.spec.blocks,
        world=world,
        config=config.engine,
        accumulate=config.train.accumulate,
        clip_norm=config.optim.clip_norm,
        score_step=config.optim.score_step,
    )
    if isinstance(objective, Nbd):
        objective.loss_factor, objective.search = engine.loss_factor, search_bank(world)
    return objective, engine


def _summary(config: Config, train: data.Source, targets: data.Targets | None) -> data.TargetSummary | None:
    """Return what the objective may know of the training data's targets, where it is of use."""
    if targets is not None:
        return targets.summary(train)
    return data.class_summary(train) if config.objective.class_weights == "balanced" else None


def _conclude(
    config: Config,
    context: RunContext,
    backbone: Backbone,
    objective: Objective,
    engine: Engine,
    trained: Trainable,
    evaluation: Evaluation,
    record: RetrievalRecord,
) -> dict[str, Any]:
    """Save what was trained, measure it, and add the numbers to the mask file; return the result's entries.

    The mask is there before it is measured: a run that ends in between leaves it whole, without numbers. Its
    size in the result is that of the mask alone, whatever the head takes that comes into its file last.
    """
    saved = save(config, trained, backbone, objective, context.directory, engine=engine)
    result: dict[str, Any] = {}
    if config.eval.final:
        path = context.directory / names.MEASURING / "adapted"
        progress = evaluation.begin(path, made_with=saved.identity, report=context.writer.message)
        result["adapted"] = evaluation.full(probe=config.eval.probe, progress=progress)
        if objective.classifies:
            result["adapted"] |= evaluation.head(objective, progress)
        result["adapted"] |= record.measure("adapted")
        context.writer.message(f"{config.method}: {format_numbers(result['adapted'])}")
    result |= record.result()
    if context.world.is_main:
        saved.add_numbers(result.get("adapted", {}), verdict=mark_of(result.get("retrieval")))
        keep_model(config, backbone, objective, context.directory)
    return result | saved.sizes


def _resume(
    state: RunState,
    found: OpenCheckpoint | None,
    engine: Engine,
    batches_of: BatchesOf,
    meter: Meter,
    context: RunContext,
    *,
    asked: bool,
) -> Position:
    """Restore the checkpoint that was found and return where it stands; the start where there is none.

    Args:
        asked: the user wants the run to go on (`run.resume`), and hears of it where it begins again.
    """
    if found is None:
        if asked:
            text = f"no checkpoint in {context.directory} to go on from: training begins at its first step"
            context.writer.event("note", text=text)
            context.writer.message(f"note: {text}")
        return Position()
    state.check(found)
    if found.values["position"]["step"]:
        # an engine's first step may differ from all later ones by rounding (DistributedDataParallel lays out
        # its buckets anew after it), so a resumed run rehearses one; what it moved is then overwritten
        engine.forward_backward(next(iter(batches_of(0, 0))))
        engine.optimizer.zero_grad()
    position = state.restore(found, telemetry=meter)
    context.writer.event("resume", step=position.step)
    context.writer.message(f"resumed  from the checkpoint of step {position.step}")
    return position


def build_checkpoint_schedule(config: Config, state: RunState, context: RunContext) -> CheckpointSchedule:
    """Return the schedule that saves into the run's folder. Collective: every rank must call."""
    section = config.checkpoint
    saver = Saver(
        context.directory / names.CHECKPOINTS,
        Retention(section.keep_last, section.keep_every, section.keep_best),
        peers=saving_peers(context.world),
        on_commit=lambda path, seconds: context.writer.event(
            "checkpoint", path=path.name, seconds=seconds, stalled=checkpoints.stalled
        ),
        on_failure=lambda text: context.writer.message(f"WARNING: {text}"),
    )
    checkpoints = CheckpointSchedule(
        state,
        context.stop,
        saver=saver,
        every_steps=section.every_steps,
        every_seconds=section.every_minutes * 60,
        is_asynchronous=section.asynchronous,
    )
    return checkpoints


def format_numbers(values: dict[str, float]) -> str:
    """Return measures by name as one line for the user."""
    return "  ".join(f"{name} {value:.4f}" for name, value in values.items())
