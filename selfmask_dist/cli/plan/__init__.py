"""`selfmask plan`: what a configuration needs and costs on given machines, reckoned without a GPU.

    model_size   a model on the meta device -> counts of weights, FLOPs, what backward keeps
    steps        (size, configuration, hardware) -> each engine's memory, traffic and time of a step
    stages       checkpoints, evaluation, training as a whole, a cascade's experts
    tables       all of it as tables
    short        all of it in a line

Nothing here looks at a run. What was compared with measurements says docs/scale.md.
"""

import argparse
from typing import Any

from selfmask_dist.cli.config import add_settings
from selfmask_dist.cli.plan.hardware import Hardware
from selfmask_dist.common import text


def _above_zero(word: str) -> float:
    """Return a number above 0. Raises argparse's error, of which it makes a message."""
    if not 0 < float(word) < float("inf"):
        raise argparse.ArgumentTypeError(f"{word} is not a number above 0")
    return float(word)


_OPTIONS = (
    ("pictures", int, "images in data.train"),
    ("nodes", text.positive, "machines"),
    ("gpus_per_node", text.positive, "GPUs in each"),
    ("memory_gib", _above_zero, "memory of a GPU"),
    ("tflops", _above_zero, "TFLOP/s that training reaches on one"),
    ("float32_tflops", _above_zero, "TFLOP/s that an evaluation in float32 reaches on one (eval.precision)"),
    ("within_node_gbs", _above_zero, "GB/s that one sends inside a node"),
    ("between_nodes_gbs", _above_zero, "GB/s that one sends to other nodes"),
    ("node_storage_gbs", _above_zero, "GB/s that a node reads and writes files with"),
    ("storage_gbs", _above_zero, "GB/s that the file system gives to all nodes together"),
)


def add_command(commands: Any) -> None:
    """Add `plan` to the command line."""
    command = commands.add_parser(
        "plan", help="memory, traffic and time of each engine, of checkpoints and evaluation, without a GPU"
    )
    add_settings(command)
    for name, kind, meaning in _OPTIONS:
        default = getattr(Hardware, name)
        option = f"--{name.replace('_', '-')}"
        command.add_argument(option, type=kind, default=default, metavar="N", help=f"{meaning} ({default:g})")
    command.add_argument(
        "--sizes",
        type=text.positive,
        nargs="+",
        metavar="N",
        help="numbers of nodes: one line for each, with the engine to take there",
    )
    command.add_argument(
        "--line", action="store_true", help="in one line, with the engine of the configuration"
    )
    command.set_defaults(command=_plan)


def _plan(options: argparse.Namespace) -> None:
    from selfmask_dist.cli.plan.tables import describe, describe_sizes  # imports torch
    from selfmask_dist.config import load_config
    from selfmask_dist.config.site import find_site

    hardware = Hardware(**{name: getattr(options, name) for name, _, _ in _OPTIONS})
    config = load_config(options.config, options.overrides, site=find_site(options.site))
    if options.line:
        from selfmask_dist.cli.plan.short import in_a_line

        print(in_a_line(config, hardware))
        return
    print(describe_sizes(config, hardware, options.sizes) if options.sizes else describe(config, hardware))
