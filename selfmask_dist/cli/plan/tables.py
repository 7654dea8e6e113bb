"""A plan as text: what is assumed, a line for each engine or number of nodes, and what to set."""

from collections.abc import Sequence
from dataclasses import replace

from selfmask_dist.cli.plan.hardware import GIB, Hardware
from selfmask_dist.cli.plan.model_size import ModelSize
from selfmask_dist.cli.plan.stages import reckon_evaluating, reckon_experts, reckon_saving, steps_of
from selfmask_dist.cli.plan.steps import (
    Estimate,
    bank_bytes,
    choose,
    choose_with_micro_steps,
    estimate,
    measure,
)
from selfmask_dist.common import text
from selfmask_dist.config import Config

_ENGINES = "engine weights scores momentum grads gathered activ. GiB/rank GB_sent step,_s"
_SIZES = "GPUs engine micro GiB/rank GB_sent step,_s checkpoint GB/rank save,_s stop_seconds evaluation,_s"


def describe(config: Config, hardware: Hardware) -> str:
    """Return the plan as text: what is assumed, a line for each engine, which one to take, the stages."""
    size, image_size = measure(config)
    estimates = estimate(size, config, hardware, image_size=image_size)
    rows = [[word.replace("_", " ") for word in _ENGINES.split()]]
    for e in estimates:
        parts = (e.weights, e.scores, e.momentum, e.gradients, e.gathered, e.activations, e.memory)
        low, high = e.seconds
        times = [f"{e.sent / 1e9:.2f}", f"{low:.4f} - {high:.4f}"]
        rows.append([e.engine, *(f"{part / GIB:.2f}" for part in parts), *times])
    best = choose(estimates, hardware.memory_gib)
    if best is None:
        more, fitted = choose_with_micro_steps(size, config, hardware, image_size=image_size)
        advice = "no engine fits: use more GPUs, or engine.checkpoint_activations=true" + (
            f", or {more.keys} train.accumulate={fitted.train.accumulate}" if more else ""
        )
    else:
        stages = "\n".join(_stages(size, config, hardware, best, image_size))
        advice = f"take {best.keys}\n\n{stages}"
    return (
        f"{_title(config, hardware)} on {hardware.nodes} x {hardware.gpus_per_node} GPUs of "
        f"{hardware.memory_gib:g} GiB\n{_assumed(hardware)}\n\n{text.table(rows)}\n\n{advice}"
    )


def describe_sizes(config: Config, hardware: Hardware, sizes: Sequence[int]) -> str:
    """Return a table with a line for each number of nodes: the engine to take there, and what it needs.

    `micro` is the number of micro-steps that it takes for a rank's part to fit.
    """
    size, image_size = measure(config)
    rows = [[word.replace("_", " ") for word in _SIZES.split()]]
    for nodes in sizes:
        on = replace(hardware, nodes=nodes)
        best, fitted = choose_with_micro_steps(size, config, on, image_size=image_size)
        if best is None:
            rows.append([str(on.world_size), "none fits"])
            continue
        saving = reckon_saving(size, config, on, best.seconds[1])
        rows.append(
            [
                str(on.world_size),
                best.engine,
                str(fitted.train.accumulate),
                f"{best.memory / GIB:.1f}",
                f"{best.sent / 1e9:.2f}",
                "{:.3f} - {:.3f}".format(*best.seconds),
                f"{saving.total / 1e9:.1f}",
                f"{saving.of_rank / 1e9:.3f}",
                f"{saving.seconds:.1f}",
                str(saving.stop_seconds),
                f"{reckon_evaluating(size, config, on, best).seconds:.0f}",
            ]
        )
    return (
        f"{_title(config, hardware)}, {(size.masked + size.frozen) / 1e9:.2f} billion weights, nodes of "
        f"{hardware.gpus_per_node} GPUs of {hardware.memory_gib:g} GiB\n{_assumed(hardware)}\n\n"
        f"{text.table(rows)}"
    )


def _title(config: Config, hardware: Hardware) -> str:
    micro = config.train.accumulate
    return (
        f"{config.backbone.name}, {config.objective.name}, {config.engine.precision}, global batch "
        f"{config.train.global_batch_size}{f' in {micro} micro-steps' if micro > 1 else ''}"
    )


def _assumed(hardware: Hardware) -> str:
    return (
        f"assumed: {hardware.tflops:g} TFLOP/s, {hardware.float32_tflops:g} in a float32 evaluation,\n"
        f"{hardware.within_node_gbs:g} GB/s within a node, "
        f"{hardware.between_nodes_gbs:g} GB/s between nodes,\n"
        f"files: {hardware.node_storage_gbs:g} GB/s of a node and {hardware.storage_gbs:g} GB/s in all, "
        f"{hardware.pictures:,} pictures"
    )


def _stages(
    size: ModelSize, config: Config, hardware: Hardware, best: Estimate, image_size: int
) -> list[str]:
    """Return a line for each stage beside the step, on the engine to take."""
    steps = steps_of(config, hardware)
    low, high = (text.duration(steps * seconds) for seconds in best.seconds)
    saving = reckon_saving(size, config, hardware, best.seconds[1])
    evaluating = reckon_evaluating(size, config, hardware, best)
    lines = [
        f"training    {steps:,} steps, {low} to {high}",
        f"checkpoint  {text.size(saving.total)}, {text.size(saving.of_rank)} a rank, copied to host memory "
        f"({text.size(saving.of_node)} a node); {saving.seconds:.1f} s to save or to read: "
        f"checkpoint.stop_seconds={saving.stop_seconds} launch.signal_seconds={saving.signal_seconds}",
        f"evaluation  {text.duration(evaluating.seconds)} to embed data.train in {evaluating.precision}, "
        f"{evaluating.passes} times; embeddings of {text.size(evaluating.embeddings)} in all; "
        f"{evaluating.memory / GIB:.2f} GiB/rank where nothing is trained (a cascade, selfmask eval)",
    ]
    if config.method == "cascade":
        experts = reckon_experts(size, config, hardware, image_size=image_size)
        needs = "no engine fits there: set cascade.expert_groups=1"
        if experts.engine is not None:
            needs = f"{experts.engine.memory / GIB:.2f} GiB/rank with {experts.engine.keys}"
        lines.append(
            f"cascade     {experts.count} experts in {experts.groups} group(s) of {experts.ranks} ranks: "
            f"{needs}; {experts.count + 1} masks embed data.train"
        )
    if config.objective.name == "nbd":
        lines.append(
            f"objective   {bank_bytes(config, hardware) / GIB:.2f} GiB on each rank for nbd's bank of "
            f"{hardware.pictures:,} pictures and its softmax, beside the above"
        )
    return lines
