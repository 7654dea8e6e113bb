"""One run from its configuration to its result.

    engine -> frozen baseline -> attach masks -> train -> save the mask -> evaluate -> result.json

`method` says what is trained: mask (scores), finetune (weights), probe (a linear probe on frozen features) or
frozen (nothing). Methods that are chains of runs, the cascade and the procedures, call `run_in` for each.
"""

import gc
import json
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from selfmask_dist import data
from selfmask_dist.backbones import Backbone
from selfmask_dist.common import names
from selfmask_dist.common.files import write_json
from selfmask_dist.config import Config
from selfmask_dist.evals.measure import Evaluation
from selfmask_dist.evals.targets.measure import begin_evaluation
from selfmask_dist.parallel import World, shards_weights
from selfmask_dist.runs.checkpoint import (
    DamagedCheckpointError,
    OpenCheckpoint,
    loading_peers,
    open_newest,
)
from selfmask_dist.runs.context import RunContext, open_run
from selfmask_dist.runs.folder import create_run_directory, drop_metrics_after, remove_measured, run_path
from selfmask_dist.runs.preempt import StopRequest
from selfmask_dist.runs.speed.fabric import report_fabric
from selfmask_dist.runs.verdict import closing, judge
from selfmask_dist.training.adapt import adapt, format_numbers
from selfmask_dist.training.build import (
    build_backbone,
    check_run,
    open_data,
    open_what_there_is,
    shard_backbone,
)
from selfmask_dist.training.habits.watching import hold_validation
from selfmask_dist.training.retrieval.record import RetrievalRecord
from selfmask_dist.training.retrieval.score_lr import describe_choice, with_chosen_score_lr


def run_in(
    config: Config,
    world: World,
    stop: StopRequest,
    *,
    is_restart: bool,
    parent: Path | None = None,
    is_trial: bool = False,
) -> dict[str, Any]:
    """Run a configuration to its end within a world that is there, and return what `result.json` holds.

    Collective: every rank must call.

    Args:
        is_restart: go on in the run's folder where there is one.
        parent: the folder of the run that this one is a stage of.
        is_trial: whether it only tries a setting, so that what speaks against its result is not said.
    """
    directory = run_path(config)
    if world.is_main:
        create_run_directory(config, is_restart=is_restart)
    world.barrier()
    if (directory / names.RESULT).exists():  # requeued after its end
        if world.is_main:
            remove_measured(config)
        finished: dict[str, Any] = json.loads((directory / names.RESULT).read_text())
        return finished
    config, choice = with_chosen_score_lr(
        config,
        world,
        train_fn=lambda trial: run_in(trial, world, stop, is_restart=True, parent=directory, is_trial=True),
    )
    damaged: list[Path] = []
    while True:
        found = find_checkpoint(directory, world, skip=damaged)
        if found is None and config.procedure.start_from is not None:
            found = find_checkpoint(Path(config.procedure.start_from), world, skip=damaged)
        if world.is_main:
            drop_metrics_after(directory, found.values["position"]["step"] if found else 0)
        try:
            with open_run(config, directory, world, stop, parent=parent) as context:
                if config.launch.fabric_check and not is_trial:
                    report_fabric(context)
                result = _run(config, context, found, choice)
                if parent is None:
                    context.writer.message(closing(directory, result))
                elif not is_trial:  # a stage's numbers are shown by the run that it is a part of
                    for entry in result["verdict"]:
                        context.writer.message(f"VERDICT: {entry['text']}")
                return result
        except DamagedCheckpointError as error:
            damaged.append(error.path)
        gc.collect()  # model and optimizer, which hold some of it; all is built anew for the one before


def find_checkpoint(directory: Path, world: World, *, skip: Collection[Path] = ()) -> OpenCheckpoint | None:
    """Return a run's newest checkpoint, the same on every rank; its tensors are verified when they are read.

    Collective: every rank must call.

    Args:
        skip: those that turned out to be damaged.
    """
    return open_newest(
        directory / names.CHECKPOINTS,
        peers=loading_peers(world),
        report=lambda text: print(text, file=sys.stderr),
        verify_later=True,
        skip=skip,
    )


def _run(
    config: Config, context: RunContext, found: OpenCheckpoint | None, choice: dict[str, Any]
) -> dict[str, Any]:
    trains = config.method in ("mask", "finetune")
    train, test = open_data(config) if config.needs_labels else open_what_there_is(config)
    train, validation = hold_validation(config, train) if trains else (train, None)
    num_test = 0 if test is None else len(test)
    cuts_weights = config.engine.name == "fsdp" if trains else shards_weights(config.engine, context.world)
    backbone = build_backbone(config, in_file=cuts_weights, world=context.world)
    notes = check_run(config, backbone, train, test)
    if not cuts_weights:  # that engine moves what it keeps
        backbone.encoder.to(context.world.device)
    elif not trains:
        shard_backbone(backbone, config, context.world, keeps_frozen=False)
    paced = context.paced_check
    evaluation = begin_evaluation(
        config, backbone, train, test, context.world, validation=validation, begin_loop=paced
    )
    writer = context.writer
    record = RetrievalRecord(evaluation, context.directory, context.world)
    writer.event("start", world_size=context.world.size, train_samples=len(train), test_samples=num_test)
    writer.message(_describe(config, backbone, train, test, context.world, validation))
    if config.data.subset is None:  # a part need not have all classes
        _say(context, notes)
    result: dict[str, Any] = {
        "method": config.method,
        "backbone": backbone.spec.name,
        "fingerprint": backbone.spec.fingerprint,
        **choice,
    }
    if choice:
        writer.message(f"score_lr {describe_choice(choice)}")

    def measure_frozen() -> None:
        if config.eval.frozen_baseline or not trains:
            result["frozen"] = _once(
                context.directory / names.FROZEN,
                context.world,
                lambda: _measure_frozen(config, context, evaluation) | record.measure("frozen"),
            )
            result["frozen"] |= record.measure("frozen")  # which a restart finds
            if context.world.is_main:
                remove_measured(config, "frozen")
            writer.message(f"frozen backbone: {format_numbers(result['frozen'])}")

    if trains:
        result |= adapt(config, context, backbone, train, evaluation, record, found, measure_frozen)
    else:
        measure_frozen()
        result |= record.result() | {"stored_bytes": 0}  # beside the backbone; the probe is a head
    # of the main rank, which has the metrics: the others' results say nothing of it
    is_main = context.world.is_main
    result["verdict"] = judge(config, result, context.directory, num_test=num_test) if is_main else []
    if is_main:
        write_json(context.directory / names.RESULT, result)
    context.world.barrier()  # nobody looks for a file that is not there yet, or reads one that goes
    if is_main:
        remove_measured(config)
    writer.event("end", **result)
    return result


def _say(context: RunContext, notes: Sequence[str]) -> None:
    for note in notes:
        context.writer.event("note", text=note)
        context.writer.message(f"note     {note}")


def _measure_frozen(config: Config, context: RunContext, evaluation: Evaluation) -> dict[str, float]:
    """Return the frozen backbone's numbers by labels. Collective: every rank must call."""
    path = context.directory / names.MEASURING / "frozen"
    return evaluation.full(
        probe=config.eval.probe or config.method == "probe",
        progress=evaluation.begin(path, made_with="", report=context.writer.message),
    )


def _once(path: Path, world: World, measure_fn: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Return numbers that a restart finds in a file. Collective: every rank must call."""
    exists = torch.tensor([float(world.is_main and path.exists())], device=world.device)
    if world.sum(exists).item():
        known: dict[str, float] = json.loads(path.read_text())
        return known
    values = measure_fn()
    if world.is_main:
        write_json(path, values)
    return values


def _describe(
    config: Config,
    backbone: Backbone,
    train: data.Source,
    test: data.Source | None,
    world: World,
    validation: data.Source | None,
) -> str:
    spec = backbone.spec
    chosen_by = "" if validation is None else f", {len(validation):,} validation"
    tested = "no" if test is None else f"{len(test):,}"
    return (
        f"run      {run_path(config)}: {config.method} on {world.size} process(es), {world.device.type}\n"
        f"backbone {spec.name}: {spec.num_parameters:,} weights, dim {spec.dim}, "
        f"{spec.preprocessing.image_size} px, "
        f"fingerprint {spec.fingerprint[:12]}\n"
        f"data     {len(train):,} train{chosen_by} and {tested} test images, {len(train.classes)} classes"
    )
